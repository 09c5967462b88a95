"""Levels priced by a formula and by a table of milliseconds: the stitched model is within the limit, and no choice that
brute force finds within it has a smaller error.
"""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from tests.core.conftest import Describe

from compresso.core.axis import Axis
from compresso.core.cost_table import CostTable
from compresso.core.lookup_cost import LookupCost
from compresso.core.quantities import Cost, CostName
from compresso.solve.level_costs import Masks, choose_priced, priced, stitched


def looked_up(axes: Sequence[Axis], seed: int) -> LookupCost:
    """A table of milliseconds that are no formula's."""
    draw = random.Random(seed)
    modules = {
        axis.name: {n: sum(sorted(draw.uniform(0.1, 3) for _ in range(9))[:n]) for n in range(axis.size + 1)}
        for axis in axes
        if axis.kind in ("head", "channel")
    }
    return LookupCost(axes, CostTable({}, modules, 0.37), {})


def levels_of(axes: Sequence[Axis]) -> dict[str, list[Masks]]:
    """Each module whole, with half of its units, and gone with its sub-layer."""
    found: dict[str, list[Masks]] = {}
    for axis in axes:
        if axis.kind in ("head", "channel"):
            assert axis.layer is not None
            gone = {"head": "attention", "channel": "mlp"}[axis.kind]
            half = {axis.name: (torch.arange(axis.size) < axis.size // 2).float()}
            found[axis.name] = [{}, half, {gone: (torch.arange(3) != axis.layer).float()}]
    return found


@pytest.mark.parametrize("of", ["blocks", "milliseconds"])
@pytest.mark.parametrize("seed", range(6))
def test_the_stitched_model_is_within_the_limit_and_nothing_better_is(
    describe: Describe, of: CostName, seed: int
) -> None:
    model = describe(16, 3, 4, 12, 20, kv_heads=2, depth=True)
    axes = model.axes
    cost: Cost = model if of == "blocks" else looked_up(axes, seed)
    draw, levels = random.Random(seed), levels_of(axes)
    items = [priced(name, masks, cost, of, (0.0, draw.random(), 1 + draw.random())) for name, masks in levels.items()]
    masks = list(levels.values())
    limit = draw.uniform(0.4, 0.9) * float(cost().count(of))
    found = choose_priced(items, masks, cost, of, limit)
    assert found.cost == float(cost(stitched(masks, found.levels)).count(of)) <= limit
    best = min(
        sum(item.errors[level] for item, level in zip(items, chosen, strict=True))
        for chosen in itertools.product(range(3), repeat=len(items))
        if float(cost(stitched(masks, chosen)).count(of)) <= limit * (1 - 1e-6)
    )
    assert found.error <= best + 1e-12
