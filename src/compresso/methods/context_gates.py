"""Dynamic Context Pruning: each layer learns which earlier tokens it will not need again, and drops them from its cache
for good (arXiv 2305.15805, NeurIPS 2023; code sanagno/adaptively_sparse_attention).

In the paper's order: interaction queries and keys of the block's normed input, a score for each pair of tokens plus a
learned offset, an alpha-entmax gate of it with alpha rising along half a cosine, the product of a token's gates as a
mask on attention, and a loss on what is live. Afterwards gates are steps, and `compresso.load` gives the model a cache
that frees what they drop.

Departures:
- the live share counts real entries alone (the public code also counts the constant upper triangle, so that its gamma
  of .3 is .15 here), and tokens of padding neither drop nor count;
- `keep_context` holds a target: gamma follows dual ascent, and at the end one shift of all offsets puts the share of
  step gates on the target, measured on `landing` training examples; the paper trains at several gammas instead;
- rotary positions and groups of key/value heads, which the paper has not: keys keep the position they were rotated at,
  and all groups of a layer drop a token together; rank 32 where a layer has at most four key/value heads;
- `train: gates` leaves the body frozen and trains the gates alone. That is ours, not the paper's;
- alpha may begin above 1 (`alpha_start`), where scores above 1/(alpha - 1) open a gate exactly: a frozen body cannot
  make up for products of gates that are never open. How far scores spread depends on the norms before attention, so
  projections may be scaled to a `spread`;
- offsets have a rate of their own (`offset_lr`), being one number a layer where projections are sums over the width;
- what is left of a token may be one logistic gate of its least score (`gating: least`), the same once gates are steps;
  a product over hundreds of queries is next to nothing, or of gates that are exactly open and have no gradient;
- alpha may rise by equal factors of alpha - 1 (`alpha_even`), and gates on a frozen body may be judged by what they
  change in each layer instead of by the task's loss (`judged_by: layers`): no pass back through the body;
- logarithms carry exact zeros beside them, where the public code adds 1e-40, which is 0 in half precision.

No engine serves it: files hold the weights, and other engines open the model without gates.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.context_gates import STEP, alpha_schedule
from compresso.core.row import Row
from compresso.edit.context_attention import NAME, attentions_of, refuse_foreign, release_
from compresso.edit.context_gates import ContextGates, rank_for
from compresso.edit.context_landing import USUAL_LANDINGS, land_
from compresso.edit.eager import attention_of
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import AdamW, Effects, Learning, Passes, Trains, TunesLora, stage
from compresso.stage.tuning import group_of, learner, settled, tune
from compresso.training.context_objective import ContextObjective
from compresso.training.groups import Group
from compresso.training.history import curve
from compresso.training.noise import mixed_seed


@stage(
    "context_gates",
    title="each layer learns to drop tokens from its cache for good",
    paper="2305.15805",
    effects=Effects.WEIGHTS | Effects.FORWARD,
    needs=("data", "gradients", "training"),
    when="Long contexts whose cache is what memory goes to; served by compresso.load alone.",
    failures=(
        "What is dropped never comes back: facts that are asked for late suffer first. Other engines open the model"
        " without its gates."
    ),
)
class ContextGatesStage:
    """Knobs of dynamic context pruning.

    Args:
        keep_context: share of the context that stays live, held by dual ascent; None for a fixed gamma.
        gamma: weight of the live share, where it starts or stays.
        dual_rate: how fast gamma follows the gap, an update; .05 in 50 updates.
        gate_rank: of interaction queries and keys; None for 64, or 32 with at most four key/value heads.
        offset: start of the learned offsets.
        spread: standard deviation of scores at the start, to which projections are scaled on one example; None as
            drawn.
        alpha_start, alpha_end, alpha_over: alpha rises from one to the other over so many updates, None for all.
        gating: what is left of a token: the "product" of its gates (published), or one logistic gate, alpha times as
            steep, of its "least" score so far. Both are the same once gates are steps.
        alpha_even: whether it rises by equal factors of alpha - 1; the paper's rise is even in alpha, which shuts most
            of the interval in which gates learn within the first tenth.
        judged_by: the loss that gates keep low, of the "task" (published), or what they change in each of the "layers"
            alone, for a frozen body.
        train: "all" weights with the gates (published), "lora" adapters with them, or "gates" alone, the body frozen.
        gate_lr: rate of the gates; None for `lr`.
        offset_lr: rate of the offsets; None for that of the gates.
        landing: training examples on which the offsets are shifted to `keep_context` at the end; 0 leaves them.
        trains, lora, adamw: see `Trains`, `TunesLora` and `AdamW`.
    """

    keep_context: Annotated[float, Gt(0), Le(1)] | None = 0.2
    gamma: Annotated[float, Ge(0)] = 0.15
    dual_rate: Annotated[float, Ge(0)] = 1e-3
    gate_rank: Annotated[int, Ge(1)] | None = None
    offset: float = 2.0
    spread: Annotated[float, Gt(0)] | None = None
    alpha_start: Annotated[float, Ge(1)] = 1.0
    alpha_end: Annotated[float, Ge(1)] = 8.0
    alpha_over: Annotated[int, Ge(0)] | None = None
    gating: Literal["product", "least"] = "product"
    alpha_even: bool = False
    judged_by: Literal["task", "layers"] = "task"
    train: Literal["all", "lora", "gates"] = "all"
    gate_lr: Annotated[float, Ge(0)] | None = None
    offset_lr: Annotated[float, Ge(0)] | None = None
    landing: Annotated[int, Ge(0)] = 8
    trains: Trains = Trains(steps=25_000, batch=6, micro_batch=6)
    lora: TunesLora = TunesLora()
    adamw: AdamW = AdamW(lr=1e-4, lr_schedule="constant", clip=None)

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raises ArchError for attention that is not patched, RecipeError for knobs that do not go together."""
        if self.judged_by == "layers" and self.train != "gates":
            raise RecipeError(
                f"judged_by=layers, train={self.train}: layers are compared with a body that stays as it is; set"
                " train=gates, or judged_by=task"
            )
        if self.alpha_even and min(self.alpha_start, self.alpha_end) <= 1:
            raise RecipeError(
                f"alpha_start={self.alpha_start:g}, alpha_end={self.alpha_end:g}: equal factors of alpha - 1 want both"
                " above 1; raise them, or set alpha_even=false"
            )
        refuse_foreign(model)
        attentions_of(model)

    def check_data(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        window: int | None,
    ) -> None:
        """Raises RecipeError where the target is less than one token of the longest example."""
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        if self.keep_context is not None and self.keep_context * longest < 1:
            raise RecipeError(
                f"keep_context={self.keep_context} of {longest} tokens is less than one token; wanted at least"
                f" {1 / max(longest, 1):.3g}, or longer examples (data.max_length)"
            )

    def learning(self) -> Learning:
        """The gates, with all weights, adapters or a frozen body."""
        return Learning(
            self.trains,
            [self.trains.steps],
            self.lora if self.train == "lora" else None,
            frozen=self.train == "gates",
            own=self._numbers,
        )

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, and of the shift of offsets."""
        passes = self.learning().passes()
        passes += [Passes("spread", 1)] if self.spread is not None else []
        return [*passes, Passes("landing", self.landing, forwards=USUAL_LANDINGS)] if self._lands else passes

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """Another attention than the model's own."""
        own = attention_of(model)
        return [] if own == "sdpa" else [f"attention is SDPA with an additive mask instead of {own}, from here on"]

    @property
    def _lands(self) -> bool:
        return bool(self.landing) and self.keep_context is not None

    def _numbers(self, model: PreTrainedModel) -> dict[str, int]:
        rank = self.gate_rank or rank_for(model)
        return {"gates": len(attentions_of(model)) * (2 * int(model.config.hidden_size) * rank + 1)}

    def __call__(self, job: Job) -> Job:
        """Hold gates on the model, train, turn them to steps and leave them as a patch."""
        (total,) = self.trains.updates(len(job.rows))
        stored, attention = job.model.dtype, attention_of(job.model)
        seed = mixed_seed("context_gates", job.seed)
        gates = ContextGates(job.model, self.gate_rank or rank_for(job.model), self.offset, seed).to(job.device)
        if self.train == "gates":
            job.model.requires_grad_(False)
        if self.spread is not None:
            gates.spread_(job.model, job.collated(list(job.rows[:1])), self.spread)
        learned: nn.Module = job.model if self.train == "gates" else learner(job, self._adapters())
        gates.hold_(job.model)
        beside = gates.apart(job.model) if self.judged_by == "layers" else nullcontext()
        try:
            objective, groups = self._objective(job, learned, gates, total)
            with beside:
                history = tune(
                    job,
                    "context_gates",
                    self.trains,
                    objective,
                    groups,
                    total,
                    before_step=lambda _: objective.ascend_(),
                )
        finally:
            release_(job.model)
        if self.train != "gates":
            job = settled(job, learned, stored, "context_gates", self.trains)
        gates = gates.requires_grad_(False).eval()
        gates.at(STEP)
        shift, live = self._land_(job, gates)
        patch = gates.patch()
        patch.apply_(job.model)
        job.model.eval()
        return replace(job, patches=(*job.patches, patch)).note(
            "context_gates",
            updates=total,
            train=self.train,
            trainable=sum(group.numbers for group in groups if group.name != "gamma"),
            rank=patch.params["rank"],
            gamma=self.gamma if objective.gamma is None else objective.gamma.item(),
            keep_context=self.keep_context,
            live_fraction=None if live is None else sum(live) / len(live),
            live_by_layer=live,
            shift=shift,
            attention=f"{NAME} (SDPA with an additive mask), {attention} otherwise",
            curve=curve(history),
        )

    def _adapters(self) -> TunesLora | None:
        return self.lora if self.train == "lora" else None

    def _objective(
        self, job: Job, learned: nn.Module, gates: ContextGates, total: int
    ) -> tuple[ContextObjective, list[Group]]:
        """What is minimised, and by which rules."""
        over = total if self.alpha_over is None else self.alpha_over
        alpha = alpha_schedule(self.alpha_start, self.alpha_end, over, self.alpha_even)
        objective = ContextObjective(
            learned,
            gates,
            job.task.loss if self.judged_by == "task" else None,
            alpha,
            gamma=self.gamma,
            target=self.keep_context,
            rate=self.dual_rate,
            by_least=self.gating == "least",
        )
        hidden = int(job.model.config.hidden_size)
        rates = self.adamw if self.gate_lr is None else replace(self.adamw, lr=self.gate_lr)
        offsets = nn.ParameterList(gate.offset for gate in gates.gates)
        projections = nn.ParameterList(one for gate in gates.gates for one in (gate.queries, gate.keys))
        own = rates if self.offset_lr is None else replace(self.adamw, lr=self.offset_lr)
        groups = [
            group_of("gates", projections, rates, hidden, total),
            group_of("offsets", offsets, own, hidden, total),
        ]
        if self.train != "gates":
            groups.insert(0, group_of(self.train, learned, self.adamw, hidden, total))
        if objective.gamma is not None:
            groups.append(Group("gamma", [objective.gamma], 0.0))  # it moves by dual ascent, not by AdamW
        return objective, groups

    @torch.no_grad()
    def _land_(self, job: Job, gates: ContextGates) -> tuple[float, list[float] | None]:
        """Shift all offsets so that the target is live, and say by how much and what is live in each layer."""
        if not self._lands or self.keep_context is None:
            return 0.0, None
        batches = [job.collated([row]) for row in list(job.rows[: self.landing])]
        gates.hold_(job.model)
        try:
            return land_(job.model, gates, batches, self.keep_context)
        finally:
            release_(job.model)
