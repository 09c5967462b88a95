"""How many units stay at each update of a training that prunes as it goes, and which (HomoDistil, arXiv 2302.09632);
and what stays after each of a few rounds.

The kept share of every matrix follows one cubic curve (Zhu and Gupta, arXiv 1710.01878), from all at `start` to its end
at `end`: most leave early, when a step of training repairs most. Units leave in the order of their scores among those
that are left and never come back, so that what stays at any update lies within what stayed before.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, infeasible, removable
from compresso.core.quantities import Cost
from compresso.solve.allocate import keep_best, keep_counts
from compresso.solve.uniform import uniform_targets


def kept_share(final: float, done: int, start: float, end: float) -> float:
    """The share that stays after `done` updates: 1 up to `start`, `final` from `end`, cubic between.

    The curve leaves 1 at a slope of -3 (1 - final) / (end - start).

    >>> [kept_share(0.5, done, 10, 20) for done in (0, 10, 15, 20, 30)]
    [1.0, 1.0, 0.5625, 0.5, 0.5]
    """
    if done >= end:
        return final
    left = 1 - max(0.0, done - start) / (end - start)
    return final + (1 - final) * left**3


def geometric_share(final: float, done: int, rounds: int) -> float:
    """The share that stays after `done` of a few rounds, each of which keeps the same share of what it finds.

    The cubic curve is made for removal at every update: of four rounds down to .5 its first would take 58 % of all that
    leaves, and its last 2 %. By equal factors, each round has about as much to make up for as the others.

    >>> [round(geometric_share(0.5, done, 4), 3) for done in range(5)]
    [1.0, 0.841, 0.707, 0.595, 0.5]
    """
    return final if done == rounds else final ** (done / rounds)


def kept_count(size: int, final: int, done: int, start: float, end: float) -> int:
    """Units that stay of `size`, of which `final` stay at the end: the share of them, rounded up.

    >>> [kept_count(10, 4, done, 0, 10) for done in (0, 1, 5, 10)]
    [10, 9, 5, 4]
    """
    wanted = kept_share(final / size, done, start, end) * size
    return max(final, math.ceil(wanted - 1e-9))  # 0.3 * 10 is more than 3


def still_kept(
    axes: Sequence[Axis], scores: Mapping[str, Tensor], gone: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """The best units among those that are left: axis name -> [size], bool.

    Args:
        axes: all of them.
        scores: axis name -> [size], finite and not negative; of units that are gone they do not count.
        gone: axis name -> [size], bool.
        counts: axis name -> units that stay; fewer where fewer are left.
    """
    ranked = {axis.name: torch.where(gone[axis.name], -1.0, scores[axis.name]) for axis in axes}
    least = {axis.name: min(counts[axis.name], axis.size - int(gone[axis.name].sum())) for axis in axes}
    kept = keep_counts(axes, ranked, least).masks(axes)
    return {axis.name: kept[axis.name].bool() for axis in axes}


def slicing_updates(start: int, end: int, n_slices: int) -> tuple[int, ...]:
    """After how many updates tensors are cut: evenly spread behind `start`, the last at `end`.

    >>> slicing_updates(0, 20, 4), slicing_updates(0, 2, 50)
    ((5, 10, 15, 20), (1, 2))
    """
    n = min(n_slices, end - start)
    return tuple(start + (end - start) * (i + 1) // n for i in range(n))


def final_counts(axes: Sequence[Axis], cost: Cost, budget: Budget) -> dict[Kind, int]:
    """How many units of each kind every layer keeps at the end, near one common share and on the budget.

    The stream of an encoder (an axis with LayerNorms) is as wide as all heads of a layer together, since its config
    says only that. Where heads, or the channels of heads, and hidden dimensions may both leave, they keep one ratio: of
    the ratios the one whose channels, which fill up the budget, are nearest to it. Multiples of whole heads are those
    of a config whose stream stays, and do not hold then. Raises InfeasibleBudget.
    """
    pool = removable(axes, budget)
    hidden = next((axis for axis in pool if axis.kind == Kind.HIDDEN and axis.layer_norms), None)
    heads = [axis for axis in pool if axis.kind in (Kind.HEAD, Kind.HEAD_CHANNEL)]
    if hidden is None or not heads or len({axis.size for axis in heads}) > 1 or hidden.size % heads[0].size:
        return uniform_targets(axes, cost, budget)
    kind, size, channels = heads[0].kind, heads[0].size, [axis for axis in pool if axis.kind == Kind.CHANNEL]
    width, limit = hidden.size // size, budget.limit(cost)
    most = min((axis.size for axis in channels), default=0)
    allowed = budget.allowed(Kind.CHANNEL, most, max((budget.fewest(axis) for axis in channels), default=0))
    fewest = max(1, *(budget.fewest(axis) for axis in heads), -(-budget.fewest(hidden) // width))

    def fits(counts: Mapping[Kind, int]) -> bool:
        shares = {axis.name: torch.full((axis.size,), counts[axis.kind] / axis.size).double() for axis in pool}
        return budget.settled(cost(shares).count(budget.of)) <= limit

    def beside(n: int) -> dict[Kind, int] | None:
        """The counts with so many units of a head's kind, and as many channels as fit; None if none do."""
        counts = {kind: n, Kind.HIDDEN: n * width}
        if not channels:
            return counts if fits(counts) else None
        first_above = bisect_left(allowed, True, key=lambda c: not fits({**counts, Kind.CHANNEL: c}))
        return {**counts, Kind.CHANNEL: allowed[first_above - 1]} if first_above else None

    def drift(counts: Mapping[Kind, int]) -> float:
        """How much larger a share of heads stays than of channels."""
        return counts[kind] / size - counts.get(Kind.CHANNEL, size) / (most or size)

    def beyond(n: int) -> bool:
        """Whether so many leave channels a smaller share, or none; once true, it stays true as n grows."""
        counts = beside(n)
        return counts is None or drift(counts) > 0

    held = range(fewest, size + 1) if kind == Kind.HEAD else budget.allowed(kind, size, fewest)
    streams = set(budget.allowed(Kind.HIDDEN, hidden.size))
    choices = [n for n in held if n * width in streams]
    place = bisect_left(choices, True, key=beyond)
    found = [counts for n in choices[max(place - 1, 0) : place + 1] if (counts := beside(n)) is not None]
    if not found:
        nothing = {axis.name: torch.zeros(axis.size) for axis in pool}
        smallest = {kind: choices[0], Kind.HIDDEN: choices[0] * width, Kind.CHANNEL: allowed[0]}
        raise infeasible(budget, pool, cost, keep_best(pool, nothing, smallest))
    return min(found, key=lambda counts: abs(drift(counts)))
