"""Scores of units that need only the weights, and what a unit takes of a count."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.quantities import Cost, CostName


def magnitude(axes: Sequence[Axis], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean square of each unit's own entries, float32: axis name -> [size].

    The structured form of magnitude pruning: Han et al. (arXiv 1506.02626) on whole units, L2 over the group as
    LLM-Pruner offers it (arXiv 2305.11627, section 3.2), divided by the number of entries so that kinds of different
    size compare.
    """
    scores: dict[str, Tensor] = {}
    for axis in axes:
        device = parameters[axis.slices[0].param].device
        total = torch.zeros(axis.size, dtype=torch.float32, device=device)
        entries = torch.zeros(axis.size, dtype=torch.float32, device=device)
        for piece in axis.slices:
            weight = parameters[piece.param].detach()
            if piece.unit is not None:
                total[piece.unit] += weight.float().square().sum()
                entries[piece.unit] += weight.numel()
            else:
                squares = piece.entries(weight.float().square(), axis.size)
                total += squares.sum(dim=1)
                entries += squares.shape[1]
        scores[axis.name] = total / entries.clamp(min=1)
    return scores


def prices_of_units(axes: Sequence[Axis], cost: Cost, of: CostName = "blocks") -> dict[str, Tensor]:
    """How much of a count each unit carries in the dense model, the count's gradient at all-ones masks: axis name ->
    [size], float64.

    Where units do not cost alike, as in a table of times, it is what leaves with all units of the axis, shared out: of
    a staircase the last step may be level, and its units would seem to cost nothing.
    """
    if not cost.even(of):
        whole = float(cost().count(of))
        without = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        least = {name: float(cost({name: mask}).count(of)) for name, mask in without.items()}
        each = {axis.name: (whole - least[axis.name]) / max(axis.size, 1) for axis in axes}
        return {axis.name: torch.full((axis.size,), each[axis.name], dtype=torch.float64) for axis in axes}
    ones = {axis.name: torch.ones(axis.size, dtype=torch.float64, requires_grad=True) for axis in axes}
    gradients = torch.autograd.grad(
        cost(ones).count(of), list(ones.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(ones, gradients, strict=True))


def parameters_per_unit(axes: Sequence[Axis], cost: Cost, of: CostName = "blocks") -> dict[str, float]:
    """How much of a count one unit of each axis carries in the dense model, the mean over its units."""
    return {name: float(price.mean()) for name, price in prices_of_units(axes, cost, of).items()}


def prices(axes: Sequence[Axis], cost: Cost, of: CostName) -> dict[str, float]:
    """What one unit takes of a count, of the axes whose units take anything: FFN units hold nothing of a cache. Axes
    without units are among them, at no price that matters.
    """
    empty = {axis.name for axis in axes if not axis.size}
    return {name: price for name, price in parameters_per_unit(axes, cost, of).items() if price > 0 or name in empty}
