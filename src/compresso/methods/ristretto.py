"""Ristretto: layers, heads and channels traded for each other on the model, without training. compresso's own.

1. A bank of nested choices: of every attention and FFN the order in which its units leave by exact optimal brain
   surgeon, and what is left fitted by least squares (`compresso.sweep.bank`; the surgeon's updates as in ZipLM, Kurtic
   et al., arXiv 2302.04089).
2. Beginnings: no, a few, ... layers leave in the order of least block influence (ShortGPT, Men et al., arXiv
   2403.03853), and the widths of all others are the exact choice by the bank's errors.
   By choice one more, whose widths are near those that gate-Taylor leaves (Michel et al., arXiv 1905.10650): errors of
   single sub-layers do not see what the loss minds.
3. Each beginning is built and judged by its KL divergence from dense on rows that the bank has not seen; by choice
   after the stage `repair` has repaired it (`judged: repaired`), since layers gain most by that and widths were
   fitted before.
4. Evolution from the best of them, every candidate compared with the dense model by the KL divergence (EvoPress,
   Sieberling et al., arXiv 2410.14649), as it is or after a repair on few rows (`repaired_rows`).
5. The best that evolution found are judged like the beginnings; of all that were judged, the nearest is taken that
   repeats itself little more than the dense model when it writes.

The stage leaves weights as the bank fitted them; put `repair` behind it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, NoSuchUnits, removable
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.quantities import Budgeted
from compresso.core.row import Row
from compresso.errors import BudgetError
from compresso.job import Job
from compresso.methods.bank_cut import cut, places_apart, refuse_apart, unseen
from compresso.methods.repair import Repair
from compresso.methods.ristretto_beginnings import SCORED, Beginnings
from compresso.methods.ristretto_judge import Build, Judge
from compresso.methods.ristretto_repaired import RepairedDivergence, few_rows
from compresso.solve.bank_budget import DEPTHS, WIDTHS, keeping_fewest, plan_of_alike, refuse_other_kinds
from compresso.solve.bank_choice import STEPS, Menu, evenly, items, menu
from compresso.solve.evolve import Evolution, Fitness
from compresso.solve.level_choice import Item, Levels
from compresso.solve.search import Search, recorded, search_levels
from compresso.stage import Calibrates, Effects, Passes, stage
from compresso.sweep.bank import BankKnobs, make_bank
from compresso.sweep.bank_levels import BankLevels
from compresso.sweep.calibration import Calibration
from compresso.sweep.candidates import CandidateDivergence, candidate_divergence
from compresso.training.fitness_journal import journalled
from compresso.training.noise import mixed_seed
from compresso.training.order import ShuffledBatches


@stage(
    "ristretto",
    title="trades layers, heads and channels for each other under one budget, by search on the model",
    paper="2410.14649",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data",),
    when="The best model of a size without training, where minutes to hours of forward passes are at hand.",
    failures=(
        "What it finds fits its calibration data: give a mixture, and at least eight tokens for each input of the"
        " widest linear. Recovery narrows the lead over scores."
    ),
)
class Ristretto:
    """Knobs of ristretto.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs", "kv", "bytes_at_context" or "milliseconds"; see `Removes`.
        kinds: what may leave: attention and mlp (a block without both leaves as a layer), head, query and channel.
        layout: "free", or "uniform": equal widths in all layers, and whole layers leave; not with "evolve".
        search: "none" keeps one share in every layer, "dp" takes the best beginning, "evolve" goes on from it.
        evolution: length and breadth of the search; see `compresso.solve.evolve.Evolution`.
        calibrates: what block influence is measured on, and, of rows that nothing else sees, what candidates of the
            evolution are compared on; the last stage of selection takes all.
        examples: calibration rows of the bank, and of repairs, at most.
        batch_of_bank: rows a forward pass of these.
        steps: widths of an FFN that are tried, at most.
        damping: share of the mean diagonal added to second moments when weights are fitted.
        beginnings: judged, at most, from no layer gone to layers alone.
        by_gradients: how many more are judged, at most, with widths near those of gate-Taylor, each from a backward
            pass over what `calibrates` names: the first with all layers, others with some gone, evenly spaced short of
            as many as are enough alone.
        finalists: best candidates of the evolution that are judged.
        judged: by their divergence as "found", or "repaired" as `repair` behind this stage will make them; slow.
        repaired_rows: rows that a candidate of the evolution is repaired on before it is compared; 0 compares
            candidates as they are.
        judge_rows: rows that neither the bank, nor repairs, nor the evolution see.
        texts: of these rows, continued to look for repetition; 0 looks at none.
        repeats: by how much more than the dense model's a candidate's share of repeated 4-grams may be.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.8
    of: Budgeted = "blocks"
    kinds: tuple[Kind, ...] = (*DEPTHS, *WIDTHS)
    layout: Literal["free", "uniform"] = "free"
    search: Literal["none", "dp", "evolve"] = "evolve"
    evolution: Evolution = Evolution(generations=20, offspring=12)
    calibrates: Calibrates = Calibrates(batches=16, batch=1, micro_batch=1)
    examples: Annotated[int, Ge(2)] = 128
    batch_of_bank: Annotated[int, Ge(1)] = 4
    steps: Annotated[int, Ge(1)] = STEPS
    damping: Annotated[float, Gt(0), Le(1)] = 0.1
    beginnings: Annotated[int, Ge(1)] = 4
    by_gradients: Annotated[int, Ge(0)] = 0
    finalists: Annotated[int, Ge(0)] = 2
    judged: Literal["repaired", "found"] = "found"
    repaired_rows: Annotated[int, Ge(0)] = 0
    judge_rows: Annotated[int, Ge(1)] = 16
    texts: Annotated[int, Ge(0)] = 8
    repeats: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        """Refuse what no bank holds. Raises ValueError."""
        refuse_other_kinds(self.kinds)
        if self.layout == "uniform" and self.search == "evolve":
            raise ValueError(
                "layout=uniform keeps one width in all layers, and search=evolve gives each its own; give search: dp"
                + (" and by_gradients: 0" if self.by_gradients else "")
            )
        if self.by_gradients and (
            self.layout == "uniform" or self.search == "none" or not set(self.kinds) & set(SCORED)
        ):
            raise ValueError(
                f"by_gradients={self.by_gradients} gives heads and channels of each layer a number of their own;"
                " give 0, or search: dp or evolve, layout: free, and kinds that name head or channel"
            )
        if self.repaired_rows == 1:
            raise ValueError(
                "repaired_rows=1: a repair is fitted to some rows and chosen by others; give at least 2, or 0"
            )
        if self.search == "none" and not set(self.kinds) & {Kind.HEAD, Kind.CHANNEL}:
            raise ValueError("search=none keeps one share in every layer; let kinds name head or channel")

    def budget(self) -> Budget:
        """The share that these knobs describe."""
        even = self.kinds if self.layout == "uniform" else ()
        return Budget(
            self.keep, self.of, self.kinds, uniform_over=[kind for kind in even if kind in (Kind.HEAD, Kind.CHANNEL)]
        )

    def needs_more(self) -> tuple[str, ...]:
        """Gradients, for widths by them."""
        return ("gradients",) if self.by_gradients else ()

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raise BudgetError for a model that has none of the units."""
        try:
            removable(axes_of(arch, model, (Kind.QUERY,)), self.budget())
        except NoSuchUnits as error:
            raise BudgetError(f"ristretto: {error}", refused=error.of_stage("ristretto")) from error

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan within the budget for units that are all alike: widths, or whole parts where widths cannot meet it.
        Raises ValueError without one, or such units.
        """
        return plan_of_alike(axes, cost, self.budget())

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The bank's look, block influence, repairs and losses of what is judged, and candidates of the search."""
        evolves = self.search == "evolve"
        n_judged = {"none": 1, "dp": self.beginnings, "evolve": self.beginnings + 1 + self.finalists}[self.search]
        n_judged += self.by_gradients
        repaired = n_judged if self.judged == "repaired" else 0
        passes = [Passes("calibration", self.examples), Passes("search", self.judge_rows, 1 + 2 * n_judged)]
        passes.append(Passes("comparison", 2 * n_judged))  # of each as masked and as smaller
        if self.search != "none":
            passes.append(Passes("calibration", self.calibrates.examples))
        if self.by_gradients:
            passes.append(Passes("calibration", self.by_gradients * self.calibrates.examples, backwards=1))
        for one in self._repair.work(model, arch) if repaired else ():
            passes.append(replace(one, forwards=one.forwards * repaired))
        if evolves and self.repaired_rows:
            n = 2 + sum(self.evolution.most)
            passes += [Passes("search", self.repaired_rows, 2 * n), Passes("comparison", 2 * n)]
            sizes = self.evolution.sizes(self.calibrates.examples)
            passes += [Passes("search", size, n) for size, n in zip(sizes, self.evolution.most, strict=True)]
        elif evolves:
            each = self.calibrates.examples // self._pieces
            passes.append(Passes("search", self.calibrates.examples, 3))
            sizes = self.evolution.sizes(self._pieces)
            passes += [Passes("search", size * each, n) for size, n in zip(sizes, self.evolution.most, strict=True)]
        return passes

    def __call__(self, job: Job) -> Job:
        """Make the bank, search, judge, and leave the best."""
        refuse_apart(job, "ristretto")
        _, of_judges, of_compared = self._places(job)
        seen, judges, compared = self.split_rows(job)
        axes, cost, of_run = axes_of(job.arch, job.model, (Kind.QUERY,)), job.cost(), job.same("ristretto", self)
        self.dry_run_plan(axes, cost)
        looking = replace(job, rows=seen)
        run = looking.sweeping("ristretto", self)
        bank = make_bank(run, Calibration(self.examples, self.batch_of_bank), BankKnobs(moments=True))
        choice = menu(bank, self.kinds, self.steps)
        priced = items(choice, axes, cost, self.of)
        limit = self.budget().limit(cost) - float(cost().count(self.of))
        fitted = partial(self._fitted, choice, run.folder / "bank")
        repair = self._repair if self.judged == "repaired" else None
        build = partial(cut, choice=choice, axes=axes, fitted=fitted, by="ristretto")
        # repairs of what is judged choose by rows that the bank has not seen, as the stage behind this one will
        known = replace(job, rows=[*seen, *compared]).note(
            "ristretto", unseen=unseen([*seen, *compared], range(len(seen), len(seen) + len(compared)))
        )
        judge = Judge(build, repair, known, judges, self.texts, job.rounds("judged", of_run))
        first = Beginnings(looking, self.calibrates, choice, priced, limit, of_run)
        order = self._order(first, axes)
        for levels in self._beginnings(first, order):
            judge(levels)
        facts: dict[str, Any] = {}
        for n in first.few_gone(order, self.by_gradients):
            if (widths := first.by_gradients(self.keep, self.of, self.kinds, sorted(order[:n]))) is not None:
                judge(widths)
                facts.setdefault("by_gradients", []).append(list(judge.seen).index(widths))
        if self.search == "evolve":
            apart = replace(job, rows=compared)
            with self._divergence(looking, apart, choice, build, fitted(job)) as (divergence, adopted):
                fitness = keeping_fewest(divergence, choice, axes)
                found, told = self._evolved(job, choice, priced, limit, judge.best, fitness, adopted, of_run)
                facts |= {**told, "calibration": divergence.facts}
            for levels in found:
                judge(levels)
        levels, place = judge.taken(self.repeats)
        told = {
            "bank": {"blocks": [bank.blocks[layer] for layer in sorted(bank.blocks)], **bank.identity["knobs"]},
            "judged": [{**one, "gone": choice.empty_blocks(levels)} for levels, one in judge.seen.items()],
            "taken": place,
            "levels": {one.name: [level.units, level.slots] for one, level in choice.picked(levels)},
            **facts,
        }
        return build(job, levels).note("ristretto", unseen=unseen(job.rows, of_judges, of_compared), **told)

    def split_rows(self, job: Job) -> tuple[list[Row], list[Row], list[Row]]:
        """Rows for the bank and repairs, rows to judge by, and rows to compare candidates of an evolution on, or else
        to choose repairs of what is judged by, drawn without repetition. Raises DataError.
        """
        seen, judges, compared = ([job.rows[i] for i in places] for places in self._places(job))
        return seen, judges, compared

    def _places(self, job: Job) -> list[list[int]]:
        """Of these rows among the job's."""
        chosen_by = self.judge_rows if self.judged == "repaired" else 0
        most = [self.judge_rows, self.calibrates.examples if self.search == "evolve" else chosen_by]
        return places_apart(job.rows, most, mixed_seed("ristretto rows", job.seed))

    def _order(self, first: Beginnings, axes: Sequence[Axis]) -> list[int]:
        """Layers in the order in which they leave; none where they may not, or where no beginning asks."""
        layers = [axis for axis in axes if axis.kind == Kind.LAYER]
        return first.order(layers[0]) if layers and self.search != "none" and set(DEPTHS) <= set(self.kinds) else []

    def _beginnings(self, first: Beginnings, order: Sequence[int]) -> list[Levels]:
        """What is judged first, but for widths by gradients."""
        if self.search == "none":
            return [evenly(first.choice, first.priced, first.limit)]
        return first.with_layers_gone(order, self.beginnings, even=self.layout == "uniform")

    @contextmanager
    def _divergence(
        self, job: Job, apart: Job, choice: Menu, build: Build, install: BankLevels
    ) -> Iterator[tuple[CandidateDivergence | RepairedDivergence, Callable[[Levels], None]]]:
        """How far candidates are from dense, and what is called with each parent.

        Args:
            job: with the rows that repairs may see.
            apart: with those to compare on.
            choice: of levels.
            build, install: make a candidate of a model, apart or in place.
        """
        if self.repaired_rows:
            few, sizes = few_rows(job, self.repaired_rows), self.evolution.sizes(len(apart.rows))
            yield RepairedDivergence(build, few, self.batch_of_bank, apart.rows, sizes), lambda _: None
            return
        n = min(self._pieces, -(-len(apart.rows) // min(self.calibrates.batch, self.calibrates.micro_batch)))
        batches = list(islice(self.calibrates.read(self._batches(apart)), n))
        sizes = self.evolution.sizes(len(batches))
        blocks, at = job.arch.blocks(job.model), [one.layer for one in choice.sub_layers]
        with candidate_divergence(job.model, blocks, at, install, choice.dense, batches, sizes) as divergence:
            yield divergence, divergence.adopt

    def _evolved(
        self,
        job: Job,
        choice: Menu,
        priced: Sequence[Item],
        limit: float,
        start: Levels,
        fitness: Fitness,
        adopted: Callable[[Levels], None],
        same: Mapping[str, Any],
    ) -> tuple[list[Levels], dict[str, Any]]:
        """The best candidates of the evolution from a beginning, and facts for the records."""
        journal, most = job.rounds("candidates", same), 2 + sum(self.evolution.most)
        with journalled(fitness, journal, most, job.progress(), "candidates", job.ranks) as written:
            found = search_levels(
                Search.EVOLVE,
                priced,
                limit,
                start,
                written,
                self.evolution,
                seed=mixed_seed("ristretto", job.seed),
                together=choice.pairs,
                adopted=adopted,
            )
        best = [found.levels, *(levels for levels, value in found.finalists if math.isfinite(value))]
        facts = {"history": recorded(found.history), "candidates": list(found.tried)}
        return list(dict.fromkeys(best))[: 1 + self.finalists], facts

    def _fitted(self, choice: Menu, bank: Path, job: Job) -> BankLevels:
        """What puts a job's model at levels."""
        return BankLevels(job.model, job.arch, choice, bank, self.damping)

    @property
    def _repair(self) -> Repair:
        """What is done to candidates before they are judged."""
        knobs: dict[str, Any] = {"examples": self.examples, "batch": self.batch_of_bank}
        return Repair(**knobs)

    @property
    def _pieces(self) -> int:
        """Forward passes over the calibration data."""
        return self.calibrates.batches * -(-self.calibrates.batch // self.calibrates.micro_batch)

    def _batches(self, job: Job) -> ShuffledBatches:
        return job.batches(self.calibrates.batch, "ristretto")
