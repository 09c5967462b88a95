"""The cubic schedule and what it keeps: counts at every update, sets within sets."""

import itertools
import math

import pytest
import torch

from compresso.core.axis import Axis, Kind, Slice
from compresso.solve.gradual import kept_count, kept_share, slicing_updates, still_kept


@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
def test_the_curve(final: float) -> None:
    """The spec's test b: ends, monotony, and the slope at the start."""
    start, end = 100, 900
    assert kept_share(final, start, start, end) == 1 and kept_share(final, end, start, end) == final
    values = [kept_share(final, done, start, end) for done in range(1000)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    slope = kept_share(final, start + 1, start, end) - 1
    assert slope == pytest.approx(-3 * (1 - final) / (end - start), rel=2e-3)


@pytest.mark.parametrize(("size", "final"), [(10, 3), (768, 528), (1, 1), (64, 1)])
def test_counts_are_the_share_rounded_up(size: int, final: int) -> None:
    """The spec's test c."""
    counts = [kept_count(size, final, done, 5, 70) for done in range(100)]
    assert counts[5] == size and counts[70] == counts[99] == final
    for done, count in enumerate(counts):
        exact = kept_share(final / size, done, 5, 70) * size
        assert count == math.ceil(exact - 1e-9)


def test_sets_lie_within_sets_whatever_the_scores() -> None:
    axes = [Axis(f"layers.{i}.channels", Kind.CHANNEL, 12, (Slice("w", 0),), (), "", layer=i) for i in range(2)]
    draw = torch.Generator().manual_seed(0)
    scores: dict[str, torch.Tensor] = {}
    gone = {axis.name: torch.zeros(12, dtype=torch.bool) for axis in axes}
    for done in range(1, 11):
        scores = {axis.name: torch.rand(12, generator=draw, dtype=torch.float64) for axis in axes}
        n = kept_count(12, 4, done, 0, 10)
        kept = still_kept(axes, scores, gone, {axis.name: n for axis in axes})
        for axis in axes:
            here = kept[axis.name]
            assert int(here.sum()) == n and not bool((here & gone[axis.name]).any())
            left = scores[axis.name][~gone[axis.name]]
            assert float(scores[axis.name][here].min()) == float(left.sort(descending=True).values[n - 1])
            gone[axis.name] = ~here
    again = still_kept(axes, scores, gone, {axis.name: 12 for axis in axes})
    assert all(bool((again[axis.name] == ~gone[axis.name]).all()) for axis in axes)


def test_cuts_end_where_pruning_ends() -> None:
    assert slicing_updates(3, 100, 7)[-1] == 100 and len(slicing_updates(3, 100, 7)) == 7
    assert slicing_updates(0, 5, 50) == (1, 2, 3, 4, 5) and slicing_updates(4, 5, 3) == (5,)
