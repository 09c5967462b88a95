"""HomoDistil: the student starts as its teacher and loses units a little at every update (Liang et al., arXiv
2302.09632).

Section 3.1, distillation: the task's loss, and the distance from the teacher in logits, embeddings, hidden states and
    attention maps (`training/homodistil_objective.py`).
Section 3.2, pruning: every update scores units by |theta dL/dtheta| of that whole loss (`core/sensitivity.py`), in a
    moving average; the share that stays falls along one cubic curve for all matrices (`solve/gradual.py`); what leaves
    is set to 0 with its moments and never comes back (`training/gradual_pruning.py`). All layers keep as many channels
    of their FFNs, all heads as many of queries and keys and as many of values (`arch/head_channels.py`), and one mask
    of hidden dimensions holds for the whole model.

No code was released. From the paper: sizes 65, 17.3, 15.6 and 14.1 million of 109, 28,000 updates of 4,096 texts of 128
tokens, AdamW with eps 1e-6, a rate of 3e-4 at the base size and 6e-4 at the others, falling linearly.

Guessed, as nobody published them: the weights of the five distances (1 each; sums over layers), temperature 1, no units
    leave before update 0 and none after 70 % of them, the moving average's momentum .85, 10 % of warm-up, weight decay
    .01, a clip of 1, how often tensors are cut, and which share of a target size each kind of unit bears (one common
    share, as near as whole units allow; an encoder's heads and hidden dimensions keep exactly one, since its config
    takes a head's width from the hidden size).

Departures. Queries, keys and values of a head keep as many channels, because a config says one width; which ones, each
    head's scores and values decide by themselves. Decoders lose whole heads, which every family's stock class can hold:
    rotary positions turn channels in pairs that all heads share. `kinds: [head, channel, hidden]` does that to an
    encoder, too. Tensors are cut every so often instead of once at the end (`cuts`), so that training becomes cheaper
    as it goes and norms see what is left; masked and cut models are compared at each cut. The projections are held at
    the identity that they begin with: hidden states are compared over the dimensions that are left. Attention maps are
    as the model uses them, its dropout included, and want eager attention, to which both models are switched meanwhile.
Decoders are not in the paper. Recipe homodistil/decoder takes the divergence of next tokens and SquareHead's features
    (`norm: global`), no task loss and no maps. Without the task's loss nothing tells units apart before the first has
    left: a student that is its teacher has no distance from it, and gradients are rounding. The moving average then
    begins with the sensitivities of the task's loss on a few batches, which later ones replace.
keep = 1 trains nothing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.squarehead import Norm
from compresso.edit.removal import Removal
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.observe.gradients import weight_gradients
from compresso.solve.gradual import final_counts, slicing_updates
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Removes, Trains, refuse_together, stage
from compresso.stage.tuning import frozen_teacher, group_of, learner, settled, tune
from compresso.training.gradual_pruning import GradualPruning
from compresso.training.history import curve
from compresso.training.homodistil_objective import HomoDistilLosses, LossWeights, Side, embedding_of
from compresso.training.launch import processes

log = logging.getLogger(__name__)
_KINDS = (Kind.HEAD, Kind.HEAD_CHANNEL, Kind.CHANNEL, Kind.HIDDEN)
_FIRST = 8
"""Batches whose labels score units where nothing else can."""
Weight = Annotated[float, Ge(0)]


@stage(
    "homodistil",
    title="the student starts as its teacher and loses units while it is distilled",
    paper="2302.09632",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="There is text for a long distillation, and a small model is wanted that keeps all layers.",
    failures=(
        "A short run removes faster than it repairs; give units more updates to leave in. Gaps early in a run that do"
        " not close mean that `done` or the rate is too high: behind `done: 0.7` a rate that falls linearly has a tenth"
        " of its area left, behind 0.35 nearly half."
    ),
    any_task=True,
    once="it removes a little after every update already, at as many `cuts` as it is given",
    alone="cuts tensors while it trains",
)
class HomoDistil:
    """Knobs of HomoDistil.

    Args:
        removes: see `Removes`; heads or, of encoders, the channels of heads, channels and hidden dimensions may leave,
            as many in every layer.
        start, done: shares of the updates before the first and after the last removal.
        cuts: how many times tensors are cut on the way, at most once an update; records say how many it was.
        momentum: of the moving average of sensitivities.
        hard_weight: of the task's loss.
        kl_weight: of the divergence from the teacher.
        embedding_weight, hidden_weight, attention_weight: of the distances; the last two are sums over layers.
        norm: of embeddings' and hidden states' distance: "none" is the mean squared difference, "global" SquareHead's.
        temperature: of the divergence.
        tokens: where logits are compared, "labelled" or "all".
        warmup: share of the updates in which the rate rises.
        weight_decay, eps: of AdamW.
        trains, adamw: see `Trains` and `AdamW`; all weights learn.
        chunk: tokens whose logits exist at a time.
        teacher_dtype, teacher_device: as in `distill`.
    """

    removes: Annotated[Removes, Knobs(without=("layout",))] = Removes(
        keep=0.6, of="total", kinds=(Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN), layout="uniform"
    )
    start: Annotated[float, Ge(0), Lt(1)] = 0.0
    done: Annotated[float, Gt(0), Le(1)] = 0.7
    cuts: Annotated[int, Ge(1)] = 50
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.85
    hard_weight: Weight = 1.0
    kl_weight: Weight = 1.0
    embedding_weight: Weight = 1.0
    hidden_weight: Weight = 1.0
    attention_weight: Weight = 1.0
    norm: Norm = "none"
    temperature: Annotated[float, Gt(0)] = 1.0
    tokens: Literal["labelled", "all"] = "labelled"
    trains: Trains = Trains(steps=28000, batch=4096, micro_batch=32)
    adamw: Annotated[AdamW, Knobs(without=("warmup",))] = AdamW(lr=3e-4, lr_schedule="linear")
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    weight_decay: Weight = 0.01
    eps: Annotated[float, Gt(0)] = 1e-6
    chunk: Annotated[int, Ge(1)] = 512
    teacher_dtype: Literal["same", "bf16", "fp32"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        kinds = self.removes.kinds
        self.removes.only(*_KINDS, what="leave a little at a time")
        if Kind.HEAD_CHANNEL in kinds and (Kind.HEAD in kinds or Kind.HIDDEN not in kinds):
            raise ValueError(
                f"kinds={[*map(str, kinds)]}: an encoder's config takes the width of its heads from the hidden size and"
                " their number; name head_channel with hidden and without head, such as [head_channel, channel, hidden]"
            )
        if self.start >= self.done:
            raise ValueError(f"start={self.start} is not before done={self.done}; both are shares of the updates")
        if not any(vars(self._weights()).values()):
            raise ValueError("all weights of the loss are 0: nothing is minimised; give one of them")

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def final(self, axes: Sequence[Axis], cost: CostModel) -> dict[str, int]:
        """Units that stay at the end: axis name -> number. Raises InfeasibleBudget."""
        pool = removable(axes, self.budget())
        counts = final_counts(axes, cost, self.budget())
        return {axis.name: counts[axis.kind] for axis in pool}

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan for units that are all alike. Raises InfeasibleBudget."""
        return Plan({name: tuple(range(n)) for name, n in self.final(axes, cost).items()})

    def learning(self) -> Learning:
        """All weights, under a teacher."""
        return Learning(self.trains, [self.trains.steps], None, teacher=True, chunk=self.chunk)

    def check_taught(self, layers: int, dense: int, removed: Plan) -> None:
        """Refuse a student that lost single query heads. Raises RecipeError."""
        divided = next((name for name in removed.kept if name.endswith(".queries")), None)
        if divided and self.removes.keep < 1:
            raise RecipeError(f"homodistil: {divided} lost query heads before, which no map is compared without")

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, the teacher's, and two examples at each cut."""
        total = self.learning().updates
        cuts = self.cuts if total is None else len(self._cuts(total))
        first = [] if self.hard_weight else [Passes("first scores", _FIRST * self.trains.micro_batch, 1, 1, True)]
        return [*first, *self.learning().passes(), Passes("comparison", 2 * cuts)]

    def __call__(self, job: Job) -> Job:
        """Train all weights towards the teacher while units leave."""
        refuse_together(("homodistil",), processes())
        axes, before = axes_of(job.arch, job.model, self.removes.kinds), job.cost()().parameters()
        if self.removes.keep == 1:
            pool = removable(axes, self.budget())
            whole = {axis.name: torch.ones(axis.size) for axis in pool}
            return job.without(whole, "homodistil", wanted_keep=1.0, updates=0)
        blocks = len(job.arch.blocks(job.model))
        self.check_taught(blocks, blocks, job.plan)
        final = self.final(axes, job.cost())
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.eval().dtype
        teacher = frozen_teacher(job, self.teacher_dtype, self.teacher_device)
        learner(job, None)
        with _eager((job.model, teacher), wanted=bool(self.attention_weight)) as switched:
            objective = self._objective(job, teacher, final, total)
            by_labels = self._score_by_labels_(job, objective)
            adamw = replace(self.adamw, warmup=round(self.warmup * total))
            learning = group_of("all", job.model, adamw, job.model.config.hidden_size, total, self.weight_decay)
            numbers, learning = learning.numbers, replace(learning, eps=self.eps)
            with objective.attached():
                history = tune(
                    job,
                    "homodistil",
                    self.trains,
                    objective,
                    [learning],
                    total,
                    before_step=objective.observe_,
                    after_update=objective.prune_,
                    begin=objective.begin,
                )
                objective.settle_(total)  # changes something only if the last updates were skipped
        facts: dict[str, Any] = {
            "updates": total,
            "trainable": numbers,
            "wanted_keep": self.removes.keep,
            "cuts": len(self._cuts(total)),
            "attention": "eager, switched" if switched else "as it was",
            "batches_scored_by_labels": by_labels,
            "lr": learning.lr,
            "curve": curve(history),
        }
        job = settled(job, job.model, stored, "homodistil", self.trains)
        return self._told(job, objective, axes, before).note("homodistil", **facts)

    def _told(self, job: Job, objective: GradualPruning, axes: Sequence[Axis], before: Mapping[str, int]) -> Job:
        """The job with what the training removed in its plan and records."""
        plan = objective.plan()
        sizes = {axis.name: axis.size for axis in axes}
        removal = Removal("homodistil", before, sizes, plan, float(objective.difference))
        job = replace(job, plan=job.plan.then(plan), removal=removal)
        return job.note("homodistil", **removal.facts(job.cost()().parameters()))

    def _objective(self, job: Job, teacher: PreTrainedModel, final: Mapping[str, int], total: int) -> GradualPruning:
        """The training, from the student as it is."""

        def side(model: PreTrainedModel) -> Side:
            blocks = list(job.arch.blocks(model))
            shapes = [shape for shape in job.arch.shapes(model) if shape.kv_heads]
            halves = job.task.halves(model, blocks if self.hidden_weight else ())
            return Side(halves, embedding_of(model), blocks, shapes[0].query_heads // shapes[0].kv_heads)

        losses = HomoDistilLosses(
            side(job.model),
            side(teacher),
            compare=job.task.compare,
            weights=self._weights(),
            norm=self.norm,
            temperature=self.temperature,
            tokens=self.tokens,
            chunk=self.chunk,
        )
        start, end = self._between(total)
        ids = list(job.held[0]["input_ids"][:128]) if job.held else []
        given = job.task.probe(job.held, job.pad_id) if job.held else None
        return GradualPruning(
            job.model,
            job.arch,
            losses,
            final,
            start=start,
            end=end,
            cuts=self._cuts(total),
            momentum=self.momentum,
            before=job.plan,
            probe=(ids, given),
        )

    def _score_by_labels_(self, job: Job, objective: GradualPruning) -> int:
        """Begin the moving average with the task's loss where a student has no distance from its teacher yet; of how
        many batches.
        """
        if self.hard_weight or job.plan.kept:
            return 0
        names = {piece.param for axis in objective.axes for piece in axis.slices}
        size = self.trains.micro_batch
        batches = job.batches(size, "homodistil")
        for update in range(_FIRST):
            batch = {name: tensor.to(job.device) for name, tensor in batches.at(update, range(size)).items()}
            objective.score_(weight_gradients(job.model, names, batch, size, job.task.loss))
        return _FIRST

    def _weights(self) -> LossWeights:
        return LossWeights(
            self.hard_weight, self.kl_weight, self.embedding_weight, self.hidden_weight, self.attention_weight
        )

    def _between(self, total: int) -> tuple[int, int]:
        """The updates between which units leave."""
        end = max(1, round(self.done * total))
        return min(round(self.start * total), end - 1), end

    def _cuts(self, total: int) -> tuple[int, ...]:
        """After how many updates tensors are cut."""
        return slicing_updates(*self._between(total), self.cuts)


@contextmanager
def _eager(models: Sequence[PreTrainedModel], *, wanted: bool) -> Iterator[bool]:
    """Within the context models compute attention maps, if that is wanted; whether one of them did not before."""
    before = [str(model.config._attn_implementation) for model in models]
    switched = wanted and any(one != "eager" for one in before)
    if switched:
        log.warning(
            "attention maps are compared: attention is eager while it trains, not %s; attention_weight: 0 keeps it",
            before[0],
        )
        for model in models:
            model.set_attn_implementation("eager")
    try:
        yield switched
    finally:
        for model, one in zip(models, before, strict=True):
            if switched:
                model.set_attn_implementation(one)
