"""Removal in rounds of equal size, for searches that look again at what is left after each of them.

The rounds are fixed by the model that they start from: the r-th ends at 1 - (r + 1) share of its count, the last at the
budget. So what a round leaves over, the next may take, and a unit worth more than a round waits until it fits. All
plans are in the units of that first model; scores and masks are in those of the model as it is by now.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.solve.allocate import allocate
from compresso.solve.removal import lowest_within

TIE = 1e-9
"""What a tie may move a score by, as a share of their range, where `allocate` chooses."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of one removal.

    Args:
        axes: those of the first model that may lose units: heads, query heads, channels and their like. Their names
            stay while units leave, but for those within heads that leave or move up.
        cost: counts the first model.
        budget: what may stay of it in the end.
        share: of its count that a round removes.
    """

    axes: Sequence[Axis]
    cost: CostModel
    budget: Budget
    share: float

    def __len__(self) -> int:
        """How many there are."""
        return n_rounds(self.budget.keep, self.share)

    def fewest(self, done: Plan, axes: Sequence[Axis]) -> dict[str, int]:
        """Axis name -> units that stay at least, of the axes of the model that `done` left."""
        of_first = {axis.name: self.budget.fewest(axis) for axis in self.axes}
        return {axis.name: of_first[done.original_name(axis.name)] for axis in axes}

    def keep(self, r: int) -> float:
        """The share of the first model that may stay after round r, from 0."""
        last = r + 1 == len(self)
        return self.budget.keep if last else max(self.budget.keep, 1 - self.share * (r + 1))

    def facts(self, plan: Plan) -> dict[str, object]:
        """What a plan makes of the first model, as records tell it of one removal."""
        before, after = self.cost().parameters(), self.cost.of(plan).parameters()
        kept = {axis.name: f"{len(plan.kept[axis.name])}/{axis.size}" for axis in self.axes if axis.name in plan.kept}
        share = after["blocks"] / before["blocks"]
        return {
            "parameters_before": before,
            "parameters_after": after,
            "kept_share_of_blocks": share,
            "units_kept": kept,
        }

    def masks(
        self,
        r: int,
        done: Plan,
        axes: Sequence[Axis],
        cost: Cost,
        scores: Mapping[str, Tensor],
        priors: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What round r leaves: axis name -> [size], 0 or 1.

        Where widths are free, units leave in the order of their scores and those of an infinite score stay; in the last
        round, and for equal widths and multiples, `allocate` meets the budget, and they leave after all others.

        Args:
            r: from 0.
            done: what the rounds before it left.
            axes, cost: of the model as it is by now.
            scores: axis name -> [size], comparable across axes; higher stays, infinity for units that nothing is known
                of. Units that leave at once are worth the sum of theirs.
            priors: axis name -> [size], comparable within an axis; by their ranks units of equal, or of infinite,
                scores leave.

        Raises ValueError as `allocate` and `lowest_within`.
        """
        budget, ranks = replace(self.budget, keep=self.keep(r)), {name: _ranks(one) for name, one in priors.items()}
        scores = _summed(axes, scores)
        if r + 1 < len(self) and not budget.uniform_over and not budget.rounds:
            allowance = float(cost().count(budget.of)) - budget.limit(self.cost)
            fewest = self.fewest(done, axes)
            plan = lowest_within(axes, scores, cost, budget.of, allowance, ties=ranks, fewest=fewest)
            return plan.masks(axes)
        first = {axis.name: done.original_name(axis.name) for axis in axes}
        there = [axis for axis in self.axes if axis.within is None or _stays(axis.within, done)]
        left = {axis.name: torch.ones(axis.size) for axis in there} | done.masks(there)
        finite = {first[name]: score for name, score in _finite(scores, ranks).items()}
        whole = {
            name: torch.zeros(len(mask), dtype=torch.float64).masked_scatter(mask > 0, finite[name])
            if name in finite
            else torch.zeros(len(mask), dtype=torch.float64)
            for name, mask in left.items()
        }
        gone = {name: mask == 0 for name, mask in left.items()}
        after = allocate(there, whole, self.cost, budget, gone).masks(there)
        return {name: after[of][left[of] > 0] for name, of in first.items() if of in after}


def n_rounds(keep: float, share: float) -> int:
    """How many rounds it takes to get down to `keep`; at least one.

    >>> n_rounds(0.7, 0.05), n_rounds(0.68, 0.05), n_rounds(1.0, 0.05)
    (6, 7, 1)
    """
    return max(math.ceil((1 - keep) / share - 1e-9), 1)


def _stays(unit: tuple[str, int], plan: Plan) -> bool:
    """Whether a unit of an axis is left."""
    return unit[0] not in plan.kept or unit[1] in plan.kept[unit[0]]


def _summed(axes: Sequence[Axis], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of which the mean over the units that leave at once, one of each axis, is the sum of those given."""
    at_once = Counter(axis.within[0] for axis in axes if axis.within is not None)
    return {axis.name: scores[axis.name] * (at_once[axis.within[0]] if axis.within else 1) for axis in axes}


def _ranks(prior: Tensor) -> Tensor:
    """The ranks of values [size] as shares of their number."""
    return prior.argsort(stable=True).argsort() / max(len(prior), 1)


def _finite(scores: Mapping[str, Tensor], ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores, float64, with infinite ones above all others, and ties in the order of ranks."""
    known = torch.cat([score[score.isfinite()].double() for score in scores.values()])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    scale = high - low or 1.0
    return {
        name: torch.where(
            score.isfinite(), score.double() + TIE * scale * ranks[name], high + scale * (1 + ranks[name])
        )
        for name, score in scores.items()
    }
