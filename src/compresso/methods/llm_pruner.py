"""LLM-Pruner: gradient-guided removal of coupled structures, then LoRA recovery (Ma, Fang and Wang, arXiv 2305.11627).

Section 3.1, coupled structures: the axes say which slices leave together: heads, FFN channels, hidden dimensions, whole
layers. Section 3.2, importance: `compresso.core.saliency`, on a few examples; "position" keeps the first units, the
authors' layer-wise baseline. Section 3.3, recovery: the stage `recover`, with the loss on responses only.

Departures: A key/value head leaves with its own query heads, and is scored with them; the authors' code folds query
    rows in another order. Calibration examples are those of the run, whole or cut to `tokens` as the authors cut
    BookCorpus; later iterations draw new ones. Layers are scored like other units by every importance but "position";
    the authors' code only keeps the first ones. Hidden dimensions that leave count as zeros in the norms, so that the
    result computes what the masked model did; there, norms average over what is left. A global ranking compares scores
    per parameter (or whatever the budget counts) and meets a budget. The authors' threshold on the bare scores takes a
    head for as much as one channel, so that nearly all channels leave before the first head. A size may be given as
    `keep` instead of the published `ratio`. float16 is widened to float32 for gradients. The authors' recovery, which
    evaluates every 100 updates, goes back to the weights of the lowest validation loss; that is up to `recover`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, cast

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.quantities import Budgeted
from compresso.core.saliency import (
    WITH_FISHER,
    WITH_GRADIENT,
    Importance,
    Reduction,
    channels_per_unit,
    kept_units,
    unit_scores,
)
from compresso.core.score import prices
from compresso.data.random_windows import random_windows
from compresso.errors import BudgetError
from compresso.job import Job
from compresso.observe.gradients import weight_fisher, weight_gradients
from compresso.solve.allocate import InfeasibleBudget, allocate, keep_counts
from compresso.solve.allocation import Allocation, allocated
from compresso.solve.uniform import uniform_targets
from compresso.stage import Calibrates, Effects, Knobs, Passes, stage
from compresso.sweep.targets import LayerRange
from compresso.training.noise import mixed_seed

_KINDS = {
    "block": (Kind.HEAD, Kind.CHANNEL),
    "global": (Kind.HEAD, Kind.CHANNEL),
    "channel": (Kind.HIDDEN,),
    "layer": (Kind.LAYER,),
}


@stage(
    "llm_pruner",
    title="removes the coupled structures whose weights the loss minds least to first or second order",
    paper="2305.11627",
    effects=Effects.SHAPES,
    needs=("data", "gradients"),
    when=(
        "A handful of examples and one backward pass; the published baseline of structured pruning, up to about a fifth"
        " without recovery."
    ),
    failures=(
        "Equal widths ignore that some layers matter more; keep the first and last layers whole. Past half, text falls"
        " apart."
    ),
)
class LlmPruner:
    """Knobs of LLM-Pruner.

    Args:
        keep: share of `of` that stays; 0.7 if neither it nor a ratio is given.
        ratio: share of units that leaves in each layer of the ranges, as published; not a share of the model.
        of: "blocks", "total", "macs", "kv" (cache entries), "bytes_at_context" or "milliseconds"; see `Removes`.
        scope: "block" (heads and channels, equally in every layer), "global" (all of them in one pool), "channel"
            (hidden dimensions) or "layer".
        attention_layers, mlp_layers: [first, end) of the layers that lose heads and channels; None for all.
        importance: "vector", "first" (element^1), "second" (element^2), "mixed", "l1", "l2", "random" or "position".
        reduction: of coupled slices: "sum", "mean", "max", "prod" or "last".
        iterations: equal steps in which units leave, scores taken again before each.
        calibrates: see `Calibrates`; a batch is what an iteration looks at.
        tokens: length of calibration windows, all of whose tokens count; None for whole examples with their own labels.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
        layout: "free" or "uniform" (equal widths in all layers, which only a global ranking or a range of layers could
            upset).
        allocation: of a global ranking: "global" (one pool), "per_layer", "sensitivity" or "exact".
    """

    keep: Annotated[float, Gt(0), Le(1)] | None = None
    ratio: Annotated[float, Gt(0), Lt(1)] | None = None
    of: Budgeted = "blocks"
    scope: Literal["block", "channel", "layer", "global"] = "block"
    attention_layers: LayerRange | None = None
    mlp_layers: LayerRange | None = None
    importance: Literal["vector", "first", "second", "mixed", "l1", "l2", "random", "position"] = "first"
    reduction: Reduction = "sum"
    iterations: Annotated[int, Ge(1)] = 1
    calibrates: Annotated[Calibrates, Knobs(without=("batches",))] = Calibrates(1, batch=10, micro_batch=10)
    tokens: Annotated[int, Ge(2)] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None
    layout: Literal["free", "uniform"] = "free"
    allocation: Allocation = "global"

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        if self.keep is not None and self.ratio is not None:
            raise ValueError(
                f"keep={self.keep} and ratio={self.ratio} are two sizes; set one to null (--set"
                " stages.llm_pruner.ratio=null)"
            )
        if self.ratio is not None and self.scope == "global":
            raise ValueError("scope='global' ranks units of unequal size in one pool; give keep instead of ratio")
        if self.allocation != "global" and self.scope != "global":
            raise ValueError(
                f"allocation='{self.allocation}' spreads a global ranking; scope='{self.scope}' has counts of its own"
            )
        if self.reduction == "prod" and self.scope == "global":
            raise ValueError(
                "reduction='prod' multiplies 4 slices for a head and 3 for a channel, which cannot compare in"
                " scope='global'"
            )
        if self.reduction == "last" and self.scope in ("channel", "layer"):
            raise ValueError(
                f"reduction='last' means nothing for scope='{self.scope}', whose slices do not compute one after"
                " another"
            )
        for knob, layers in (("attention_layers", self.attention_layers), ("mlp_layers", self.mlp_layers)):
            if layers is not None and self.scope in ("channel", "layer"):
                raise ValueError(
                    f"{knob}={list(layers)} goes with scope 'block' or 'global'; hidden dimensions and layers lie in no"
                    " range"
                )
            if layers is not None and self.layout == "uniform":
                raise ValueError(
                    f"{knob}={list(layers)} leaves other layers wider; set it to null, or layout to 'free'"
                )
            if layers is not None and layers[0] >= layers[1]:
                raise ValueError(f"{knob}={list(layers)} is empty; give [first, end) with first < end")

    def budget(self, progress: float = 1.0) -> Budget | None:
        """The budget these knobs describe, or what it is at a share of the way; None where a ratio is given."""
        if self.ratio is not None:
            return None
        keep = self.keep or 0.7
        keep = keep if progress == 1 else 1 - (1 - keep) * progress  # 1 - (1 - 0.3) is more than 0.3
        kinds, equal = _KINDS[self.scope], self.scope == "block" or self.layout == "uniform"
        return Budget(keep, self.of, kinds, uniform_over=kinds if equal else (), floor=self.floor or {})

    def chosen(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes that may lose units. Raises BudgetError for layers or kinds that the model does not have."""
        within = 1 + max((axis.layer for axis in axes if axis.layer is not None), default=-1)
        n_layers = next((axis.size for axis in axes if axis.kind == Kind.LAYER), within)
        for knob, layers in (("attention_layers", self.attention_layers), ("mlp_layers", self.mlp_layers)):
            if layers is not None and layers[1] > n_layers:
                raise BudgetError(
                    f"stage 'llm_pruner': {knob}={list(layers)} reaches past the model's {n_layers} layers; end it at"
                    f" {n_layers} or before"
                )
        ranges = {
            Kind.HEAD: range(*(self.attention_layers or (0, n_layers))),
            Kind.CHANNEL: range(*(self.mlp_layers or (0, n_layers))),
        }
        kinds = _KINDS[self.scope]
        if not any(axis.kind in kinds and axis.size for axis in axes):
            raise BudgetError(
                f"stage 'llm_pruner': scope='{self.scope}' removes units of the kinds {', '.join(kinds)}, and the"
                " model has none that can leave; give scope: block"
            )
        return [
            axis
            for axis in axes
            if axis.kind in kinds and axis.size and (axis.layer is None or axis.layer in ranges[axis.kind])
        ]

    def counts(self, axes: Sequence[Axis], cost: CostModel, progress: float = 1.0) -> dict[str, int]:
        """How many units each axis keeps at a share of the way: axis name -> number. Of a global ranking, what equal
        shares would keep.

        Raises InfeasibleBudget or BudgetError.
        """
        chosen, budget = self.chosen(axes), self.budget()
        if self.ratio is not None:
            least = Budget(max(1 - self.ratio * progress, 1e-9), kinds=_KINDS[self.scope], floor=self.floor or {})
            return {
                axis.name: max(
                    kept_units(axis.size, channels_per_unit(axis), self.ratio * progress), least.fewest(axis)
                )
                for axis in chosen
            }
        assert budget is not None
        try:
            by_kind = uniform_targets(chosen, cost, budget)
            final = {axis.name: by_kind[axis.kind] for axis in chosen}
        except InfeasibleBudget as error:
            if self.attention_layers or self.mlp_layers:
                raise BudgetError(f"stage 'llm_pruner': {error}, or widen attention_layers and mlp_layers") from error
            if self.scope != "global":
                raise
            plan = allocate(chosen, {axis.name: torch.zeros(axis.size) for axis in chosen}, cost, budget)
            final = {name: len(units) for name, units in plan.kept.items()}
        return {axis.name: axis.size - int((axis.size - final[axis.name]) * progress) for axis in chosen}

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan of these counts for units that are all alike. Raises as `counts`."""
        return Plan({name: tuple(range(n)) for name, n in self.counts(axes, cost).items()})

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """A forward and backward pass over the examples of each iteration; two for gradients of both kinds."""
        times = (self.importance in WITH_GRADIENT) + (self.importance in WITH_FISHER)
        examples = self.calibrates.batch * self.iterations
        return [Passes("calibration", examples, times, times, weights=True)] if times else []

    def __call__(self, job: Job) -> Job:
        """Score, allocate and shrink, as often as asked."""
        dense_axes, dense = job.arch.axes(job.model), job.cost()
        for iteration in range(self.iterations):
            progress = (iteration + 1) / self.iterations
            axes, cost = self.chosen(job.arch.axes(job.model)), job.cost()
            scores = self.scores(job, axes, iteration)
            if self.scope == "global":
                if self.importance not in ("random", "position"):
                    price = prices(axes, cost, self.of)
                    scores = {name: scores[name] / price[name] for name in price}
                    axes = [axis for axis in axes if axis.name in price]  # what takes nothing of the count stays
                plan = allocated(self.allocation, axes, scores, cost, self._rest_of_budget(progress, dense, cost))
            else:
                plan = keep_counts(axes, scores, self.counts(dense_axes, dense, progress))
            job = job.without(plan.masks(axes), "llm_pruner")
        return job.note(
            "llm_pruner",
            iterations=self.iterations,
            calibration_examples=(
                self._looked_at(job) * self.iterations if self.importance in (*WITH_GRADIENT, *WITH_FISHER) else 0
            ),
        )

    def scores(self, job: Job, axes: Sequence[Axis], iteration: int = 0) -> dict[str, Tensor]:
        """Scores of the units by the chosen importance: axis name -> [size], on the CPU."""
        if self.importance == "position":
            return {axis.name: -torch.arange(axis.size, dtype=torch.float64) for axis in axes}
        if self.importance == "random":
            generator = torch.Generator().manual_seed(mixed_seed("llm_pruner", job.seed, iteration))
            return {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
        importance = cast(Importance, self.importance)
        names = {piece.param for axis in axes for piece in axis.slices}
        at_once = self.calibrates.micro_batch
        batch = self._examples(job, iteration) if importance in (*WITH_GRADIENT, *WITH_FISHER) else {}
        model, loss = job.model, job.task.loss
        gradients = weight_gradients(model, names, batch, at_once, loss) if importance in WITH_GRADIENT else None
        fisher = weight_fisher(model, names, batch, loss) if importance in WITH_FISHER else None
        parameters = dict(job.model.named_parameters())
        return {
            axis.name: unit_scores(axis, importance, parameters, gradients, fisher, self.reduction) for axis in axes
        }

    def _looked_at(self, job: Job) -> int:
        """Examples of an iteration, or windows, of which a text has many."""
        return self.calibrates.batch if self.tokens is not None else min(self.calibrates.batch, len(job.rows))

    def _examples(self, job: Job, iteration: int) -> dict[str, Tensor]:
        """The calibration examples of an iteration."""
        batch, n = self.calibrates.batch, self._looked_at(job)
        if self.tokens is None and (iteration + 1) * batch > len(job.rows):  # an order of its own repeats none in it
            return job.batches(batch, f"llm_pruner {iteration}").at(0, range(n))
        if self.tokens is None:
            return job.batches(batch, "llm_pruner").at(iteration, range(n))
        seed = mixed_seed("llm_pruner", job.seed, iteration)
        return job.collated(random_windows(job.rows, batch, self.tokens, seed))

    def _rest_of_budget(self, progress: float, dense: CostModel, now: CostModel) -> Budget:
        """The budget at a share of the way as a share of what is left."""
        budget = self.budget(progress)
        assert budget is not None
        left = budget.limit(dense) / float(now().count(self.of))
        return replace(budget, keep=min(left, 1.0))
