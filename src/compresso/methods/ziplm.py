"""ZipLM, one-shot: heads, channels and whole modules leave for a target of parameters or of measured time (Kurtic,
Frantar and Alistarh, arXiv 2302.04089).

1. Of every attention and FFN a bank (section 3.1; `compresso.sweep.bank`): structures leave one at a time by exact
   optimal brain surgeon, columns of the output projection head by head and of the second FFN matrix one by one, so that
   of two that say the same the second is seen to be needed once the first is gone. Errors are relative, ||W'x - Wx|| /
   ||Wx|| over the calibration, so that a module that is gone has 1.
2. What each level costs, by formula or by a table of milliseconds of this machine (section 3.2,
   `compresso.core.latency_table`).
3. Structured SPDY (section 3.2; `compresso.solve.coefficients`): coefficients of the modules' errors are searched, the
   levels for coefficients are the exact choice within the target, and the model stitched together from these is judged
   by its loss on calibration rows.
4. The weights of the best levels are those that the surgeon left, fitted to what stays: no repair follows.

Departures.
- The published repository is empty, so that this follows the paper, and the search its predecessor SPDY (arXiv
  2201.13096): 100 vectors drawn whole, then steps that draw a tenth anew, one fewer after 100 failures. 1000
  evaluations are the paper's; they also end once steps of one coefficient fail.
- The first vector is all ones, so that on the rows that judge the result is never worse than the choice by plain
  errors.
- Where query heads share key/value heads a unit is a key/value head with all its query heads, and `query` among `kinds`
  lets query heads leave, as many of every key/value head, before these do. Tables of milliseconds hold no single query
  heads, so that they stay under such a budget.
- FFN levels are evenly spaced multiples of 16 (there, shares of .9, .81, ..., which no kernel likes).
- What costs are rounded to is a 50,000th of the budget or finer, upwards, and what that leaves is spent (there, a
  10,000th, to the nearest, which may end above the target).
- Rows that judge are not those that weights are fitted to (there, one calibration set): with few tokens a column, fits
  are better on their own rows than on others.
- Under `layout: uniform`, and in families whose own config holds one width for all layers, these keep the shares of
  heads and of channels of least error, and no module leaves.
- A module that is gone takes its output bias with it (there, it may stay); a block without both modules leaves as a
  layer. Relative errors are cut off at 1.
- Weights are fitted from second moments in float64 (there, updated step by step in float32, which is the same fit but
  for rounding).

Guessed: rows that judge, 16. Of the paper's table: damping .01, 512 calibration examples (GPT-2).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
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
from compresso.solve import bank as banks
from compresso.solve.bank_budget import DEPTHS, WIDTHS, keeping_fewest, plan_of_alike, refuse_other_kinds
from compresso.solve.bank_choice import Menu, evenly, grid_of, items, menu
from compresso.solve.coefficients import Choose, CoefficientSearch, Weighed, search_coefficients
from compresso.solve.level_choice import Item, Levels
from compresso.solve.level_costs import choose_priced, stitched
from compresso.solve.search import recorded
from compresso.stage import Effects, Passes, stage
from compresso.sweep.bank import BankKnobs, make_bank
from compresso.sweep.bank_levels import BankLevels
from compresso.sweep.calibration import Calibration
from compresso.sweep.candidate_loss import candidate_loss
from compresso.sweep.survey import Weighting
from compresso.training.fitness_journal import journalled
from compresso.training.noise import mixed_seed


@stage(
    "ziplm",
    title="removes heads, channels and modules by second order, down to a target of parameters or measured time",
    paper="2302.04089",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data",),
    when="A target of time on this machine, without training: minutes for the bank, then a forward pass a candidate.",
    failures=(
        "Fits follow their calibration data: give a mixture, and at least eight tokens for each input of the widest"
        " linear. Errors of one module at a time rank whole layers badly: the coefficients make up for part of that."
    ),
    any_task=True,
)
class ZipLM:
    """Knobs of ZipLM.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs", "kv", "bytes_at_context" or "milliseconds"; see `Removes`.
        kinds: what may leave: attention and mlp (a block without both leaves as a layer), head, query and channel.
        layout: "free", or "uniform": equal numbers of heads and of channels in all layers, all of which stay.
        search: of coefficients; see `compresso.solve.coefficients.CoefficientSearch`.
        examples: calibration rows of the bank, at most.
        batch: rows a forward pass of these.
        judge_rows: rows that judge candidates, and that the bank does not see.
        steps: widths of an FFN that are tried, at most.
        damping: share of the mean diagonal added to second moments.
        weighting: what a token counts in them: "none" counts all alike, "stream" by one over the squared norm of the
            stream.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Budgeted = "blocks"
    kinds: tuple[Kind, ...] = (*DEPTHS, *WIDTHS)
    layout: Literal["free", "uniform"] = "free"
    search: CoefficientSearch = CoefficientSearch()
    examples: Annotated[int, Ge(2)] = 512
    batch: Annotated[int, Ge(1)] = 4
    judge_rows: Annotated[int, Ge(1)] = 16
    steps: Annotated[int, Ge(1)] = 24
    damping: Annotated[float, Gt(0), Le(1)] = 0.01
    weighting: Weighting = Weighting.NONE

    def __post_init__(self) -> None:
        """Refuse what no bank holds, or no table. Raises ValueError."""
        refuse_other_kinds(self.kinds)
        if not self._leaving:
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]}: none of these leave under layout={self.layout} and of={self.of};"
                " name head or channel, too"
            )

    def budget(self) -> Budget:
        """The share that these knobs describe."""
        return Budget(self.keep, self.of, self._leaving, uniform_over=self._leaving if self.layout == "uniform" else ())

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """What is among the kinds and stays."""
        there = {axis.kind for axis in axes_of(arch, model, (Kind.QUERY,)) if axis.size}
        stay = [kind for kind in self.kinds if kind in there and kind not in self._leaving]
        if not stay:
            return []
        cause = "layout is uniform" if self.layout == "uniform" else "a table of milliseconds holds no single ones"
        return [f"no {' or '.join(stay)} leaves by itself, since {cause}"]

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raise BudgetError for a model that has none of the units, or has lists of layers in stages."""
        if not arch.shapes(model):
            raise BudgetError(
                f"ziplm: a {arch.name} has stages, and the bank is of one list of layers; take gate_taylor or"
                " learn_gates"
            )
        try:
            removable(axes_of(arch, model, (Kind.QUERY,)), self.budget())
        except NoSuchUnits as error:
            raise BudgetError(f"ziplm: {error}", refused=error.of_stage("ziplm")) from error

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan within the budget for units that are all alike: widths, or whole parts where widths cannot meet it.
        Raises ValueError without one, or such units, naming the floor.
        """
        widest = max((axis.size for axis in axes if axis.kind == Kind.CHANNEL), default=0)
        least = {Kind.ATTENTION: (Kind.HEAD, 1), Kind.MLP: (Kind.CHANNEL, grid_of(widest, self.steps))}
        floor = dict(held for whole, held in least.items() if whole not in self._leaving)
        return plan_of_alike(axes, cost, replace(self.budget(), floor=floor))

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The bank's look, the dense model, and as many candidates as may be asked for."""
        return [
            Passes("calibration", self.examples),
            Passes("search", self.judge_rows, 1 + self.search.evaluations),
            Passes("comparison", 2),  # as masked and as smaller once more, where layers leave behind units
        ]

    def __call__(self, job: Job) -> Job:
        """Make the bank, search coefficients, and leave the model at the best levels."""
        refuse_apart(job, "ziplm")
        fitted_to, judges = self.split_rows(job)
        axes, cost = axes_of(job.arch, job.model, (Kind.QUERY,)), job.cost()
        self.dry_run_plan(axes, cost)
        looking = replace(job, rows=fitted_to)
        run = looking.sweeping("ziplm", self)
        knobs = BankKnobs(self.damping, self.weighting, moments=True)
        bank = make_bank(run, Calibration(self.examples, self.batch), knobs)
        choice = menu(bank, self._leaving, self.steps)
        priced = [
            replace(item, errors=tuple(min(level.relative, 1.0) for level in levels))
            for item, levels in zip(items(choice, axes, cost, self.of), choice.levels, strict=True)
        ]
        masks = [
            [banks.plan(bank, {one.name: level}).masks(axes) for level in levels]
            for one, levels in zip(choice.sub_layers, choice.levels, strict=True)
        ]
        limit = self.budget().limit(cost)

        def choose(weighed: Sequence[Item]) -> Levels:
            try:
                if self.layout == "uniform":
                    return evenly(choice, weighed, limit - float(cost().count(self.of)))
                return choose_priced(weighed, masks, cost, self.of, limit).levels
            except ValueError as error:  # coarse levels miss what single units would meet
                raise BudgetError(f"ziplm: {error}, or steps") from error

        install = BankLevels(job.model, job.arch, choice, run.folder / "bank", self.damping)
        found, dense = self._searched(job, axes, choice, priced, choose, install, judges)
        told = {
            "bank": {"blocks": [bank.blocks[layer] for layer in sorted(bank.blocks)], **bank.identity["knobs"]},
            "errors": _curves(choice, priced),
            "levels": _taken(choice, priced, found),
            "loss": {"dense": dense, "plain": recorded([found.first])[0], "found": found.fitness},
            "history": recorded(found.history),
            "evaluations": found.evaluations,
            "candidates": found.tried,
            "cost": {
                "of": self.of,
                "limit": limit,
                "dense": float(cost().count(self.of)),
                "found": float(cost(stitched(masks, found.levels)).count(self.of)),
            },
        }
        build = partial(cut, choice=choice, axes=axes, fitted=lambda _: install, by="ziplm")
        return build(job, found.levels).note("ziplm", unseen=unseen(job.rows, self._places(job)[1]), **told)

    def split_rows(self, job: Job) -> tuple[list[Row], list[Row]]:
        """Rows for the bank, and rows to judge by. Raises DataError for fewer than 3."""
        seen, judges = ([job.rows[i] for i in places] for places in self._places(job))
        return seen, judges

    def _places(self, job: Job) -> list[list[int]]:
        """Of these rows among the job's."""
        return places_apart(job.rows, [self.judge_rows], mixed_seed("ziplm rows", job.seed))

    def _searched(
        self,
        job: Job,
        axes: Sequence[Axis],
        choice: Menu,
        priced: Sequence[Item],
        choose: Choose,
        install: BankLevels,
        judges: Sequence[Row],
    ) -> tuple[Weighed, float]:
        """The best coefficients, and the loss of the dense model; the model is dense afterwards."""
        at, same = [one.layer for one in choice.sub_layers], job.same("ziplm", self)
        journal, most = job.rounds("candidates", same), 1 + self.search.evaluations
        with (
            candidate_loss(
                job.model, at, install, choice.dense, lambda model: job.task.score(model, judges).mean
            ) as loss,
            torch.no_grad(),
            journalled(
                keeping_fewest(loss, choice, axes), journal, most, job.progress(), "candidates", job.ranks
            ) as fitness,
        ):
            dense = fitness(choice.dense, 0)
            seed = mixed_seed("ziplm", job.seed)
            return search_coefficients(priced, choose, fitness, self.search, seed=seed), dense

    @property
    def _leaving(self) -> tuple[Kind, ...]:
        """The kinds that the layout and the budget's measure allow."""
        even = (Kind.HEAD, Kind.CHANNEL)
        told = [kind for kind in self.kinds if self.of != "milliseconds" or kind != Kind.QUERY]
        return tuple(kind for kind in told if self.layout != "uniform" or kind in even)


def _curves(choice: Menu, priced: Sequence[Item]) -> dict[str, list[list[float]]]:
    """Of each sub-layer its levels: units and query heads of each that stay, and the relative error."""
    return {
        one.name: [[level.units, level.slots, error] for level, error in zip(levels, item.errors, strict=True)]
        for one, levels, item in zip(choice.sub_layers, choice.levels, priced, strict=True)
    }


def _taken(choice: Menu, priced: Sequence[Item], found: Weighed) -> dict[str, dict[str, float]]:
    """Of each sub-layer the level that was taken, its relative error, and what its errors were weighed by."""
    return {
        one.name: {"units": level.units, "slots": level.slots, "error": item.errors[n], "coefficient": c}
        for (one, level), item, n, c in zip(
            choice.picked(found.levels), priced, found.levels, found.coefficients, strict=True
        )
    }
