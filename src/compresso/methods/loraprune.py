"""LoRAPrune: heads and channels leave while LoRA tunes, scored by the adapters' gradients alone (Zhang et al., arXiv
2305.18403).

Section 3.2: the importance of a weight is |G * (W + s B A)|, with G built from the gradients of B and A
(`core/lora_gradient.py`), so that no weight ever has a gradient. Section 3.3: a moving average over updates; every
`every` updates the lowest units of each layer are masked, at a ratio that rises cubically from `warmup` to `done` of
the updates; then adapters are merged and the masked units removed.

Departures: The size is a budget of block parameters, shared out as equal shares of heads and channels over the layers
    that may be pruned (published: one ratio for them, whatever the model's size becomes); `scope: global` ranks all
    layers in one pool instead. The last prune is at exactly the target; the public code's strict comparison never
    applies its final ratio. Gradients are scored unscaled and before they are clipped; the public code clips them
    first, still scaled. Masks multiply before o_proj and at gate_proj and up_proj instead of every output: the same
    function. A unit of a grouped-query model is a key/value head with its query heads; the public code assumes 32 heads
    of 128. Matrices without an adapter do not count for a score but are cut like the others; the public code neither
    masks nor cuts them. keep = 1 trains nothing. Recovery is the recipe's next stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from compresso.core import schedule
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel, Counted
from compresso.core.lora_gradient import cubic_progress
from compresso.core.plan import Plan
from compresso.edit.lora import attach_, merge_
from compresso.edit.recompute import recompute_
from compresso.errors import RecipeError
from compresso.job import Effects, Job, curve, stage
from compresso.solve.allocate import allocate, keep_counts
from compresso.solve.uniform import uniform_targets
from compresso.training.duration import Duration, shortened, updates
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.lora_pruning import PruningObjective

Count = Annotated[int, Ge(1)]


@stage(
    "loraprune",
    title="removes heads and FFN units while LoRA tunes, scored by the adapters' gradients alone",
    paper="2305.18403",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="The gradients of all weights do not fit, or the weights are stored in few bits: only adapters have any.",
    failures=(
        "Early scores come from adapters that have hardly moved: a short run prunes by noise; give it a warm-up and a"
        " moving average."
    ),
)
class LoraPrune:
    """Knobs of LoRAPrune.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what may be removed: heads, channels or both.
        spared: share of the layers, the first ones, that are not pruned, nor is the last layer then; 0 prunes all.
        scope: "layer" (equal shares in every layer) or "global" (one pool).
        steps: updates or epochs.
        warmup, done: shares of the updates before the first and after the last removal.
        every: updates between removals.
        momentum: of the moving average of scores.
        batch: examples an update; micro_batch: examples a forward pass.
        rank, alpha, targets, dropout: LoRA.
        lr, lr_schedule, clip: AdamW.
        lr_at_hidden: hidden size that `lr` is meant for; other widths scale it by (lr_at_hidden / hidden size)^0.75.
            None: as it is.
        layout: "free" or "uniform" (equal widths in all layers).
        multiple_of: kind -> multiple that kept counts are rounded to.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
        checkpointing: recompute activations in the backward pass.
        save_adapter: also keep the adapter as it was before merging, in the result's folder `adapters`.
        precision: "auto", "no" or "bf16" autocast.
        max_steps: cap on the updates.
        save_every: updates between training checkpoints.
    """

    scores_by_adapters: ClassVar = True
    """The dry run refuses targets whose adapters cannot be read."""

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL)
    spared: Annotated[float, Ge(0), Lt(1)] = 0.1
    scope: Literal["layer", "global"] = "layer"
    steps: Duration = 500
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    done: Annotated[float, Gt(0), Le(1)] = 0.9
    every: Count = 10
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    batch: Count = 16
    micro_batch: Count = 16
    rank: Count = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: Annotated[float, Ge(0), Le(1)] = 0.05
    lr: Annotated[float, Ge(0)] = 3e-4
    lr_at_hidden: Count | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    clip: Annotated[float, Ge(0)] | None = 1.0
    layout: Literal["free", "uniform"] = "free"
    multiple_of: Mapping[Kind, Count] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None
    checkpointing: bool = False
    save_adapter: bool = False
    precision: Literal["auto", "no", "bf16"] = "auto"
    max_steps: Count | None = None
    save_every: Count = 50

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        if not self.kinds or not set(self.kinds) <= {Kind.HEAD, Kind.CHANNEL}:
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]}: only heads and channels are scored; give [head, channel] or one of"
                " them"
            )
        if self.warmup >= self.done:
            raise ValueError(f"warmup={self.warmup} is not before done={self.done}; both are shares of the updates")
        if self.layout == "uniform" and (self.spared or self.scope == "global"):
            raise ValueError(
                f"layout='uniform' wants equal widths: set spared to 0 (it is {self.spared}) and scope to 'layer'"
            )

    def budget(self, keep: float | None = None) -> Budget:
        """The budget these knobs describe, or the same for another share."""
        even = self.kinds if self.scope == "layer" else ()
        return Budget(
            keep or self.keep,
            self.of,
            self.kinds,
            uniform_over=even,
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

    def chosen(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes that may lose units: those of all layers but the spared ones."""
        n_layers = next(axis.size for axis in axes if axis.kind == Kind.LAYER)
        layers = range(int(self.spared * n_layers), n_layers - bool(self.spared))
        return [axis for axis in removable(axes, self.budget()) if axis.layer in layers]

    def plan(
        self,
        axes: Sequence[Axis],
        scores: Mapping[str, Tensor],
        gone: Mapping[str, Tensor],
        cost: CostModel,
        keep: float,
    ) -> Plan:
        """What stays of the axes at a share of the model; units that are gone stay gone. Raises InfeasibleBudget."""
        if self.scope == "global":
            return allocate(axes, scores, cost, self.budget(keep), gone)
        now, final = (uniform_targets(axes, cost, self.budget(share)) for share in (keep, self.keep))
        left = {axis.name: axis.size - int(gone[axis.name].sum()) if axis.name in gone else axis.size for axis in axes}
        # rounding must not ask for fewer than the end or for more than are left
        counts = {axis.name: min(max(now[axis.kind], final[axis.kind]), left[axis.name]) for axis in axes}
        last = {name: torch.where(gone[name], -1.0, score) if name in gone else score for name, score in scores.items()}
        return keep_counts(axes, last, counts)

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan for units that are all alike. Raises InfeasibleBudget."""
        chosen = self.chosen(axes)
        return self.plan(chosen, {axis.name: torch.zeros(axis.size) for axis in chosen}, {}, cost, self.keep)

    def __call__(self, job: Job) -> Job:
        """Tune, score and mask; merge, and remove what is masked."""
        cost, axes = job.cost(), self.chosen(job.arch.axes(job.model))
        if self.keep == 1:
            return job.without(
                {axis.name: torch.ones(axis.size) for axis in axes}, "loraprune", wanted_keep=1.0, updates=0
            )
        weights = {name: parameter.detach() for name, parameter in job.model.named_parameters()}
        (total,) = shortened([updates(self.steps, len(job.rows), self.batch)], self.max_steps)

        def choose(update: int, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
            """Masks after an update that removes; the last update removes down to the target in any case."""
            progress = 1.0 if update + 1 == total else cubic_progress(update + 1, total, self.warmup, self.done)
            if not progress or ((update + 1) % self.every and update + 1 < total):
                return None
            keep = self.keep if progress == 1 else 1 - (1 - self.keep) * progress
            return self.plan(axes, scores, gone, cost, keep).masks(axes)

        lora = attach_(job.model, self.rank, self.alpha, self.targets, self.dropout, job.seed)
        if self.checkpointing:
            recompute_(job.model, on=True)
        try:
            objective = PruningObjective(lora, axes, weights, choose, self.momentum).to(job.device)
        except ValueError as error:
            raise RecipeError(f"stage 'loraprune': {error}") from error
        lr = schedule.rate_for_width(self.lr, self.lr_at_hidden, job.model.config.hidden_size)
        adapters = [parameter for parameter in lora.parameters() if parameter.requires_grad]
        with objective.attached():
            history = fit(
                objective,
                [Group("lora", adapters, lr, schedule.rate(self.lr_schedule, total), clip=self.clip)],
                job.batches(self.batch, "loraprune"),
                total,
                seed=job.seed,
                accumulation=job.accumulation(self.batch, self.micro_batch),
                precision=self.precision,
                device=job.device,
                before_step=objective.observe_,
                after_update=lambda update: {"left": float(objective.mask.mean())},
                checkpoints=job.checkpoints(),
                save_every=self.save_every,
                progress=job.progress(),
                phase=lambda update: "prune",
            )
        masks = objective.masks()
        if total - 1 in history.skipped:  # the update that removes the rest was not finite
            masks = self.plan(
                axes, objective.scores(), {name: mask == 0 for name, mask in masks.items()}, cost, self.keep
            ).masks(axes)
        if self.checkpointing:
            recompute_(job.model, on=False)
        if self.save_adapter:
            job.keep_adapter(lora, "loraprune")
        trainable = sum(parameter.numel() for parameter in adapters)
        facts = {"updates": total, "trainable": trainable, "wanted_keep": self.keep, "lr": lr, "curve": curve(history)}
        return replace(job, model=merge_(lora)).without(masks, "loraprune", **facts)
