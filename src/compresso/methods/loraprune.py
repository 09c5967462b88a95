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
    masks nor cuts them. The loss falls on responses; the public script has it on instructions, too, as
    `data.train_on_inputs` does in recipe loraprune/paper. The public script goes back to the weights of the lowest
    validation loss at its end; here the last update's stay, whose masks meet the budget. keep = 1 trains nothing.
    Recovery is the recipe's next stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel
from compresso.core.lora_gradient import cubic_progress
from compresso.core.plan import Plan
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.solve.allocate import allocate, keep_counts
from compresso.solve.uniform import uniform_targets
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Removes, Trains, TunesLora, stage
from compresso.stage.tuning import attached, group_of, merged, tune
from compresso.training.duration import Duration
from compresso.training.history import curve
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
    any_task=True,
    once="it removes as it trains already, once in `every` updates",
)
class LoraPrune:
    """Knobs of LoRAPrune.

    Args:
        removes: see `Removes`; heads, channels or both may leave.
        spared: share of the layers, the first ones, that are not pruned, nor is the last layer then; 0 prunes all.
        scope: "layer" (equal shares in every layer) or "global" (one pool).
        steps: updates or epochs.
        warmup, done: shares of the updates before the first and after the last removal.
        every: updates between removals.
        momentum: of the moving average of scores.
        trains, lora, adamw: see `Trains`, `TunesLora` and `AdamW`.
    """

    removes: Removes = Removes()
    spared: Annotated[float, Ge(0), Lt(1)] = 0.1
    scope: Literal["layer", "global"] = "layer"
    steps: Duration = 500
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    done: Annotated[float, Gt(0), Le(1)] = 0.9
    every: Count = 10
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    trains: Annotated[Trains, Knobs(without=("steps",))] = Trains()
    lora: TunesLora = TunesLora(dropout=0.05)
    adamw: Annotated[AdamW, Knobs(without=("warmup",))] = AdamW(lr=3e-4, lr_schedule="linear")

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        self.removes.only(Kind.HEAD, Kind.CHANNEL, what="are scored")
        if self.warmup >= self.done:
            raise ValueError(f"warmup={self.warmup} is not before done={self.done}; both are shares of the updates")
        if self.removes.layout == "uniform" and (self.spared or self.scope == "global"):
            raise ValueError(
                f"layout='uniform' wants equal widths: set spared to 0 (it is {self.spared}) and scope to 'layer'"
            )

    def budget(self, keep: float | None = None) -> Budget:
        """The budget these knobs describe, or the same for another share."""
        even = self.removes.kinds if self.scope == "layer" else ()
        return replace(self.removes.budget(), keep=keep or self.removes.keep, uniform_over=even)

    def chosen(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes that may lose units: those of all layers but the spared ones."""
        n_layers = next(axis.size for axis in axes if axis.kind in (Kind.LAYER, Kind.ATTENTION))
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
        now, final = (uniform_targets(axes, cost, self.budget(share)) for share in (keep, self.removes.keep))
        left = {axis.name: axis.size - int(gone[axis.name].sum()) if axis.name in gone else axis.size for axis in axes}
        # rounding must not ask for fewer than the end or for more than are left
        counts = {axis.name: min(max(now[axis.kind], final[axis.kind]), left[axis.name]) for axis in axes}
        last = {name: torch.where(gone[name], -1.0, score) if name in gone else score for name, score in scores.items()}
        return keep_counts(axes, last, counts)

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan for units that are all alike. Raises InfeasibleBudget."""
        chosen = self.chosen(axes)
        return self.plan(chosen, {axis.name: torch.zeros(axis.size) for axis in chosen}, {}, cost, self.removes.keep)

    def learning(self) -> Learning:
        """Adapters, which score the units."""
        return Learning(self.trains, [self.steps], self.lora, by_adapters=True)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, whose gradients are the scores."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Tune, score and mask; merge, and remove what is masked."""
        cost, axes, least = job.cost(), self.chosen(job.arch.axes(job.model)), self.removes.keep
        if least == 1:
            return job.without(
                {axis.name: torch.ones(axis.size) for axis in axes}, "loraprune", wanted_keep=1.0, updates=0
            )
        weights = {name: parameter.detach() for name, parameter in job.model.named_parameters()}
        (total,) = self.trains.updates(len(job.rows), [self.steps])

        def choose(update: int, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
            """Masks after an update that removes; the last update removes down to the target in any case."""
            progress = 1.0 if update + 1 == total else cubic_progress(update + 1, total, self.warmup, self.done)
            if not progress or ((update + 1) % self.every and update + 1 < total):
                return None
            keep = least if progress == 1 else 1 - (1 - least) * progress
            return self.plan(axes, scores, gone, cost, keep).masks(axes)

        lora = attached(job, self.lora)
        try:
            objective = PruningObjective(lora, axes, weights, choose, job.task.loss, self.momentum).to(job.device)
        except ValueError as error:
            raise RecipeError(f"stage 'loraprune': {error}") from error
        adapters = group_of("lora", lora, self.adamw, job.model.config.hidden_size, total)
        with objective.attached():
            history = tune(
                job,
                "loraprune",
                self.trains,
                objective,
                [adapters],
                total,
                before_step=objective.observe_,
                after_update=lambda update: {"left": float(objective.mask.mean())},
                phase=lambda update: "prune",
            )
        masks = objective.masks()
        if total - 1 in history.skipped:  # the update that removes the rest was not finite
            gone = {name: mask == 0 for name, mask in masks.items()}
            masks = self.plan(axes, objective.scores(), gone, cost, least).masks(axes)
        return merged(job, lora, "loraprune", self.trains).without(
            masks,
            "loraprune",
            updates=total,
            trainable=adapters.numbers,
            wanted_keep=least,
            lr=adapters.lr,
            curve=curve(history),
        )
