"""How much of a model may be kept, and in which shapes: the one description of size that every method allocates to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.core.quantities import QUANTITIES, Cost, CostName

TOLERANCE = 0.005
"""How far above its target, as a share of it, a budget may be forced by floors and multiples before it counts as
infeasible.
"""

Floor = int | Literal["keep"]
"""Fewest units of an axis that are kept: a number, or "keep" for the budget's own share of them, to the nearest unit.
"""


@dataclass(frozen=True)
class Shortfall:
    """How far a budget is from what can be met.

    Args:
        keep: the share that was to be kept.
        share: the least one that nothing found so far speaks against.
        cause: what holds it up, in words that name no option.
        knobs: what of the budget would take that away, such as "floor.head", and the value with which it would.
    """

    keep: float
    share: float
    cause: str
    knobs: Mapping[str, int] = field(default_factory=dict[str, int])


class InfeasibleBudget(ValueError):
    """A budget that floors, multiples or the range of the gates make impossible; by how much, where that is known, and
    the kind whose units all stay, where a multiple says so and holds it up. `uncured` is the message without its cure,
    for whoever knows which knobs there are; "" where it has none to leave out.
    """

    def __init__(
        self, message: str, shortfall: Shortfall | None = None, whole: Kind | None = None, uncured: str = ""
    ) -> None:
        super().__init__(message)
        self.shortfall = shortfall
        self.whole = whole
        self.uncured = uncured


@dataclass(frozen=True)
class Refused:
    """A stage whose budget cannot be met.

    Args:
        stage: its name.
        uncured: the message without its cure.
        kinds: of the budget, those that the model has units of.
        others: other kinds that the model has units of -> the least share that is left with them beside the budget's.
    """

    stage: str
    uncured: str
    kinds: tuple[Kind, ...] = ()
    others: Mapping[Kind, float] = field(default_factory=dict[Kind, float])


class NoSuchUnits(ValueError):
    """A model has no units of the kinds that may be removed.

    Args:
        uncured: the message without its cure.
        cure: its end.
        has: kinds that it has units of.
    """

    def __init__(self, uncured: str, cure: str, has: Sequence[Kind]) -> None:
        super().__init__(uncured + cure)
        self.uncured = uncured
        self.has = has

    def of_stage(self, name: str) -> "Refused":
        """The same as a stage's refusal."""
        return Refused(name, self.uncured, others=dict.fromkeys(self.has, 0.0))


@dataclass(frozen=True)
class Budget:
    """A share of a model's size and the shapes that are allowed.

    Args:
        keep: share of the count that may be kept, in (0, 1].
        of: what is counted: parameters of the blocks, all parameters, multiply-accumulates per token, key/value cache
            entries per token, bytes, or looked-up milliseconds.
        kinds: kinds of units that may be removed.
        uniform_over: kinds of which every layer keeps the same number of units; which ones may differ.
        multiple_of: kept counts are multiples of this number, per kind. Keeping all units of an axis is always allowed.
        floor: fewest units of an axis that are kept, per kind; an axis that has fewer keeps all of them. "keep" stands
            for this budget's own share of the axis, to the nearest unit: no layer loses much more of that kind than the
            model loses in all.

    `uniform_over`, `multiple_of` and `floor` say nothing about kinds that are not in `kinds`. Kinds may be given by
    name.

    Raises:
        ValueError: values out of range, with the cure.

    >>> Budget(keep=0.7, kinds=("head", "channel"), multiple_of={"channel": 64}).allowed(Kind.CHANNEL, 150)
    [0, 64, 128, 150]
    """

    keep: float
    of: CostName = "blocks"
    kinds: Sequence[Kind] = (Kind.HEAD, Kind.CHANNEL)
    uniform_over: Sequence[Kind] = ()
    multiple_of: Mapping[Kind, int] = field(default_factory=dict[Kind, int])
    floor: Mapping[Kind, Floor] = field(default_factory=dict[Kind, Floor])

    def __post_init__(self) -> None:
        """Turn names of kinds into kinds and check all values."""
        if not 0 < self.keep <= 1:  # also refuses NaN
            raise ValueError(
                f"keep={self.keep} is not a share of the model; give a number above 0 and at most 1, such as 0.7"
            )
        if self.of not in QUANTITIES:
            raise ValueError(f"of='{self.of}' is not counted; give one of {', '.join(QUANTITIES)}")
        object.__setattr__(self, "kinds", _kinds("kinds", self.kinds))
        object.__setattr__(self, "uniform_over", _kinds("uniform_over", self.uniform_over))
        if not self.kinds:
            raise ValueError("kinds is empty, so nothing could be removed; name at least one, such as 'channel'")
        for name, least in (("multiple_of", 1), ("floor", 0)):
            given: Mapping[Kind, Floor] = getattr(self, name)
            values = dict(zip(_kinds(name, tuple(given)), given.values(), strict=True))
            for kind, value in values.items():
                if name == "floor" and value == "keep":
                    continue
                if isinstance(value, str) or value != int(value) or value < least:
                    raise ValueError(
                        f"{name}['{kind}']={value} is not a number of units; give a whole number of at least {least}"
                    )
            object.__setattr__(self, name, values)

    @property
    def rounds(self) -> bool:
        """Whether any removable kind is held to multiples above 1."""
        return any(self.multiple_of.get(kind, 1) > 1 for kind in self.kinds)

    def limit(self, cost: Cost) -> float:
        """The amount that may be kept: keep x dense, in whole entries where it comes in whole ones."""
        most = self.keep * float(cost().count(self.of)) * (1 + 1e-12)  # 0.29 * 100 is 28.999999999999996
        return math.floor(most) if QUANTITIES[self.of].whole else most

    def settled(self, amount: Tensor) -> float:
        """A measured amount without the rounding error of fractional masks."""
        return QUANTITIES[self.of].settled(float(amount))

    def fewest(self, axis: Axis) -> int:
        """Fewest units of an axis that may be kept, before rounding to multiples."""
        floor = self.floor.get(axis.kind, 0)
        return min(axis.size, max(axis.fewest, round(self.keep * axis.size) if floor == "keep" else floor))

    def least(self, axis: Axis) -> int:
        """Fewest units of an axis that may be kept, by its own floor and multiple."""
        return self.allowed(axis.kind, axis.size, self.fewest(axis))[0]

    def allowed(self, kind: Kind, size: int, fewest: int = 0) -> list[int]:
        """The counts of units that `size` units of a kind may be reduced to, ascending; never empty, the last is
        `size`.
        """
        step = self.multiple_of.get(kind, 1)
        return [*range(-(-fewest // step) * step, size, step), size]


def removable(axes: Sequence[Axis], budget: Budget) -> list[Axis]:
    """The axes whose units the budget may remove; axes without units are passed over.

    Raises:
        NoSuchUnits: there are none.
    """
    chosen = [axis for axis in axes if axis.kind in budget.kinds and axis.size]
    if not chosen:
        has = sorted({axis.kind for axis in axes if axis.size} - {Kind.VOCAB})  # tokens are no budget's
        cure = f"; it has {', '.join(has)}: name some of those in 'kinds'" if has else "; name others in 'kinds'"
        raise NoSuchUnits(f"the model has no units of the kinds {', '.join(budget.kinds)}", cure, has)
    return chosen


def lacking(axes: Sequence[Axis], budget: Budget) -> list[Kind]:
    """The kinds that the budget may remove and a model has no units of: others have to give what they would have."""
    there = {axis.kind for axis in axes if axis.size}
    return [kind for kind in budget.kinds if kind not in there]


def infeasible(budget: Budget, axes: Sequence[Axis], cost: Cost, smallest: Plan) -> InfeasibleBudget:
    """The error for a budget below the smallest model that its floors and multiples allow."""
    quantity = QUANTITIES[budget.of]
    least, limit = float(cost.of(smallest).count(budget.of)), budget.limit(cost)
    dense = float(cost().count(budget.of))
    message = (
        f"keep={budget.keep} allows {quantity.text(limit)} of {quantity.text(dense)} {quantity.words}, but at least"
        f" {quantity.text(least)} are kept"
    )
    held_up = f"at least {quantity.text(least)} of {quantity.text(dense)} {quantity.words} are kept"
    pool = removable(axes, budget)
    there = [kind for kind in budget.kinds if any(axis.kind == kind for axis in pool)]
    held = [  # by a floor or a multiple of their own; the last unit, which a bias holds, is nobody's to lower
        axis
        for axis in pool
        if len(smallest.kept.get(axis.name, ())) > axis.fewest  # query heads go with the last head
        and budget.least(axis) > axis.fewest  # others are held with them, as heads' channels by hidden dimensions
    ]
    needed = math.ceil(least / dense * 1e4) / 1e4
    if held:  # where all units of a kind stay, that is how the model is taken: what else is held can be lowered
        axis = max(held, key=lambda one: (not _is_whole(budget, one), len(smallest.kept[one.name]) / one.size))
        cause = f"{axis.name} may not go below {len(smallest.kept[axis.name])} of {axis.size} units"
        message = f"{message}: {cause}{_beyond(budget, axis)}"
        knobs = {f"floor.{axis.kind}": 0} if budget.fewest(axis) > axis.fewest else {}
        knobs |= {f"multiple_of.{axis.kind}": 1} if budget.multiple_of.get(axis.kind, 1) > 1 else {}
        return InfeasibleBudget(
            f"{message}. Raise keep to {needed}{lower(axis.kind)}",
            Shortfall(budget.keep, least / dense, f"{held_up}, as {cause}", knobs),
            axis.kind if _is_whole(budget, axis) else None,
            message,
        )
    cause = f"in what the kinds {', '.join(there)} do not reach"
    return InfeasibleBudget(
        f"{message} {cause}. Raise keep to {needed} or add kinds",
        Shortfall(budget.keep, least / dense, f"{held_up} {cause}"),
        uncured=f"{message} {cause}",
    )


def lower(kind: Kind) -> str:
    """The end of a message on a budget that a kind holds up: which knobs would let it go."""
    return f" or lower floor or multiple_of for '{kind}'"


def _is_whole(budget: Budget, axis: Axis) -> bool:
    """Whether a multiple holds all units of an axis."""
    return 1 < axis.size <= budget.multiple_of.get(axis.kind, 1)


def _beyond(budget: Budget, axis: Axis) -> str:
    """The floor or multiple of an axis that has fewer units, in brackets: no message shows it otherwise."""
    given = {"floor": budget.floor.get(axis.kind, 0), "multiple_of": budget.multiple_of.get(axis.kind, 1)}
    told = [f"{knob} is {one:,}" for knob, one in given.items() if not isinstance(one, str) and one > axis.size]
    return f" ({' and '.join(told)})" if told else ""


def _kinds(name: str, given: Sequence[Kind]) -> tuple[Kind, ...]:
    """Kinds from kinds or their names, without repetition."""
    known = [kind.value for kind in Kind]
    for kind in given:
        if kind not in known:
            raise ValueError(f"{name} names '{kind}', which is not a kind of unit; the kinds are {', '.join(known)}")
    return tuple(dict.fromkeys(Kind(kind) for kind in given))
