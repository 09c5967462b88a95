"""Depth by search: which attentions and MLPs a model can do without together (EvoPress, Sieberling et al.,
arXiv 2410.14649, depth pruning).

What each part does alone does not add up: two layers may stand in for each other. So whole sets of parts are tried on
the model, by evolution under one budget (`compresso.solve.evolve`), and compared by the KL divergence from the dense
model, on few, more and all calibration batches (`compresso.sweep.candidates`).

Departures: attentions and MLPs trade by what they cost, so that how many of each leave is found, too (there, as many
of both leave). The search begins at the exact choice by the divergence without each part alone, or at the layers of
least block influence, whichever is nearer to dense, not at a random one. Half of the switches move a block's attention
and MLP together. The best few are also let write, as a divergence does not see repetition: those that repeat themselves
more than the dense model are passed over. A block without either leaves as a layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, removable
from compresso.core.cost import CostModel, Counted
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.job import Job
from compresso.metrics.repeats import first_that_writes, repetition_of
from compresso.observe.influence import block_influence
from compresso.solve.allocate import allocate
from compresso.solve.depth import Part, without
from compresso.solve.depth_search import as_layers, depth_items, depth_parts, gone, keeping_fewest, pairs, sub_layers_of
from compresso.solve.evolve import Evolution, Evolved
from compresso.solve.level_choice import Levels, fits
from compresso.solve.search import Search, recorded, search_levels, with_errors
from compresso.stage import Calibrates, Effects, Passes, stage
from compresso.sweep.candidates import candidate_divergence
from compresso.sweep.emptied import EmptiedSubLayers
from compresso.training.fitness_journal import journalled
from compresso.training.noise import mixed_seed

NEW_TOKENS = 48
"""Of each text that a finalist writes."""


@stage(
    "evopress",
    title="searches for the attentions and MLPs, or layers, that the model can do without together",
    paper="2410.14649",
    effects=Effects.SHAPES,
    needs=("data",),
    when="Instead of a score of each layer alone, where minutes to hours of forward passes are at hand.",
    failures="What it finds fits its calibration data: give a mixture. Recovery narrows the lead over scores.",
)
class EvoPress:
    """Knobs of the search for depth.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what leaves: "attention", "mlp" or both, in one budget, or whole layers.
        search: "dp" takes the exact choice by what each part does alone; "evolve" goes on from it.
        evolution: length and breadth of the search; see `compresso.solve.evolve.Evolution`.
        calibrates: see `Calibrates`; the last stage of selection takes all, the ones before it a fourth each.
        finalists: best candidates that are let write, in order, until one does not repeat itself; 0 looks at no text.
        texts: held-out texts that they continue.
        repeats: by how much more than the dense model's a candidate's share of repeated 4-grams may be.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.8
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.ATTENTION, Kind.MLP)
    search: Literal["dp", "evolve"] = "evolve"
    evolution: Evolution = Evolution()
    calibrates: Calibrates = Calibrates(batches=16, batch=4)
    finalists: Annotated[int, Ge(0)] = 4
    texts: Annotated[int, Ge(1)] = 8
    repeats: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        """Refuse kinds that overlap."""
        if set(self.kinds) not in ({Kind.LAYER}, {Kind.ATTENTION}, {Kind.MLP}, {Kind.ATTENTION, Kind.MLP}):
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]} do not go together; give [layer], [attention], [mlp] or [attention,"
                " mlp], where a block that loses both leaves"
            )

    def budget(self) -> Budget:
        """The share that these knobs describe."""
        return Budget(self.keep, self.of, self.kinds)

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan within the budget for parts that are all alike. Raises ValueError without one, or such parts."""
        axes = removable(axes, self.budget())
        return allocate(axes, {axis.name: torch.zeros(axis.size) for axis in axes}, cost, self.budget())

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The dense model, each part alone from its block on, and as many whole candidates as may be asked for."""
        parts = depth_parts([axis for axis in arch.axes(model) if axis.kind in self.kinds])
        blocks, sizes = len(arch.blocks(model)), self._sizes()
        alone = sum(blocks - unit for _, unit in parts) / blocks
        tried = [0] * self.evolution.stages if self.search == "dp" else self.evolution.most
        per_piece = self.calibrates.examples // self._pieces
        passes = [Passes("calibration", self.calibrates.examples, 2)] if self.search == "evolve" else []
        passes += [Passes("search", sizes[-1] * per_piece), Passes("search", sizes[0] * per_piece, alone)]
        passes += [Passes("search", size * per_piece, n) for size, n in zip(sizes, tried, strict=True) if n]
        return [*passes, Passes("search", sizes[-1] * per_piece)]

    def __call__(self, job: Job) -> Job:
        """Search, let the best write, shrink."""
        axes, cost = removable(job.arch.axes(job.model), self.budget()), job.cost()
        self.dry_run_plan(axes, cost)
        parts = depth_parts(axes)
        found, facts = self._searched(job, axes, parts, cost)
        levels, told = self._that_writes(job, axes, parts, found)
        removed = gone(parts, levels)
        return _without(job, parts, removed, {**facts, **told, "gone": [f"{name}.{unit}" for name, unit in removed]})

    def _searched(
        self, job: Job, axes: Sequence[Axis], parts: Sequence[Part], cost: CostModel
    ) -> tuple[Evolved, dict[str, Any]]:
        """The candidates that were tried, best first, and facts for the records."""
        items = depth_items(axes, parts, cost, self.of)
        limit = self.budget().limit(cost) - float(cost().count(self.of))
        dense, blocks = (0,) * len(parts), job.arch.blocks(job.model)
        install = EmptiedSubLayers(job.arch, blocks, sub_layers_of(job.arch.axes(job.model), parts))
        batches, at = list(self._calibration(job)), [unit for _, unit in parts]
        sizes = self.evolution.sizes(len(batches))
        start = self._by_influence(job, axes, parts, cost) if self.search == "evolve" else None
        if start is not None and not fits(items, start, limit):
            start = None
        most = 2 + len(parts) + (sum(self.evolution.most) if self.search == "evolve" else 0)
        journal = job.rounds("candidates", job.same("evopress", self))
        with (
            candidate_divergence(job.model, blocks, at, install, dense, batches, sizes) as divergence,
            journalled(
                keeping_fewest(divergence, axes, parts), journal, most, job.progress(), "candidates", job.ranks
            ) as fitness,
        ):
            items = with_errors(items, dense, fitness)
            found = search_levels(
                Search(self.search),
                items,
                limit,
                start,
                fitness,
                self.evolution,
                seed=mixed_seed("evopress", job.seed),
                together=pairs(parts),
                adopted=divergence.adopt,
            )
            facts = {
                "calibration": divergence.facts,
                "alone": dict(zip([i.name for i in items], recorded(i.errors[1] for i in items), strict=True)),
                "history": recorded(found.history),
                "candidates": list(found.tried),
            }
        return found, facts

    def _by_influence(self, job: Job, axes: Sequence[Axis], parts: Sequence[Part], cost: CostModel) -> Levels | None:
        """The candidate of block influence, whole layers where there are any; None where the budget is finer."""
        every = job.arch.axes(job.model)
        whole = [axis for axis in every if axis.kind == Kind.LAYER and len(self.kinds) > 1]
        budget = replace(self.budget(), kinds=(Kind.LAYER,)) if whole else self.budget()
        how = job.observing("influence", job.same("evopress", self))
        blocks = job.arch.blocks(job.model)
        scores = block_influence(job.model, blocks, every, budget.kinds, self._calibration(job), how).scores
        try:
            kept = allocate(whole or axes, scores, cost, budget).kept
        except InfeasibleBudget:
            return None
        return tuple(int(unit not in kept[whole[0].name if whole else name]) for name, unit in parts)

    def _that_writes(
        self, job: Job, axes: Sequence[Axis], parts: Sequence[Part], found: Evolved
    ) -> tuple[Levels, dict[str, Any]]:
        """The best candidate that repeats itself little more than the dense model, and facts for the records."""
        finalists = [(levels, value) for levels, value in found.finalists if math.isfinite(value)][: self.finalists]
        tokenizer, texts = job.tokenizer, [row["input_ids"] for row in job.held if len(row["input_ids"]) > 1]
        if not finalists or tokenizer is None or not texts:
            return found.levels, {"divergence": found.fitness, "texts": 0}

        def repetition(levels: Levels) -> float:
            with gated(job.model, axes, without(axes, gone(parts, levels)).masks(axes)):
                return job.ranks.agreed(repetition_of(job.model, tokenizer, texts[: self.texts], NEW_TOKENS))

        dense = repetition((0,) * len(parts))
        place, seen = first_that_writes((repetition(levels) for levels, _ in finalists), dense + self.repeats)
        return finalists[place][0], {
            "divergence": finalists[place][1],
            "texts": len(texts[: self.texts]),
            "repetition": {"dense": dense, "finalists": seen, "taken": place},
        }

    @property
    def _pieces(self) -> int:
        """Forward passes over the calibration data."""
        return self.calibrates.batches * -(-self.calibrates.batch // self.calibrates.micro_batch)

    def _sizes(self) -> list[int]:
        """Forward passes of each stage."""
        return self.evolution.sizes(self._pieces)

    def _calibration(self, job: Job) -> Iterator[Mapping[str, Tensor]]:
        return self.calibrates.read(job.batches(self.calibrates.batch, "evopress"))


def _without(job: Job, parts: Sequence[Part], removed: Sequence[Part], facts: Mapping[str, Any]) -> Job:
    """The job after removing parts: first the layers that lose both, then, among those that stay, the others."""
    axes = job.arch.axes(job.model)
    layers, others = as_layers(axes, parts, removed)
    for wave in (layers, others):
        names = {name for name, _ in wave}
        here = [axis for axis in job.arch.axes(job.model) if axis.name in names]
        if wave or wave is others:
            job = job.without(without(here, wave).masks(here), "evopress")
    return job.note("evopress", **facts)
