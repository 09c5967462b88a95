"""How redundant a unit of a LoRA-adapted model is: the public importance functions of LHSPG (only-train-once;
LoRAShear, arXiv 2310.18356).

A unit is its entries W of the base weights together with what the adapters add to them, U = scale B A: rows of B for
outputs, columns of A for inputs. U stands where other methods have a gradient. Five criteria, each divided by its root
mean square, weighted and added:

    magnitude   |W|
    average     |W| / number of entries
    cosine      <W, U> / (|W| |U|) + 1     (1 where either is zero)
    first       |<W, U>|
    second      <W, U>^2 / 2

Departures: the public code divides by the L2 norm, which differs by the number of units alone; it can also be taken
within each kind here, because a head has many times the entries of a channel, and in one pool no head would leave
before nearly all channels. Its LHSPG divides the average by the number of groups; here, as in its HESSO, by the unit's
entries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from compresso.core.axis import Axis

Criterion = Literal["magnitude", "average", "cosine", "first", "second"]
Part = Callable[[str], Tensor | None]
"""Parameter name -> a tensor in the weight's shape, or None where it is zero."""


def unit_products(axis: Axis, one: Part, other: Part) -> Tensor:
    """Inner product of each unit's entries in two tensors of weights [size], float64, on the CPU.

    Raises:
        ValueError: an axis whose units own whole tensors.
    """
    total = torch.zeros(axis.size, dtype=torch.float64)
    for piece in axis.slices:
        if piece.unit is not None:
            raise ValueError(f"axis {axis.name} owns whole tensors; only heads and channels are scored")
        a = one(piece.param)
        b = a if one is other else other(piece.param)
        if a is not None and b is not None:
            products = piece.entries(a.float() * b.float(), axis.size)
            total += products.sum(dim=1).double().cpu()
    return total


def lora_scores(
    axes: Sequence[Axis], weight: Part, update: Part, criteria: Mapping[Criterion, float], within_kinds: bool
) -> dict[str, Tensor]:
    """Scores of all units, higher is kept: axis name -> [size], float64, on the CPU.

    Args:
        axes: heads and channels that may be removed.
        weight: base weights W.
        update: what adapters add, U.
        criteria: weight of each criterion in the sum; one that is not named counts for nothing.
        within_kinds: divide by the root mean square of the units of the same kind, not by that of all.
    """
    found = {axis.name: _criteria(axis, weight, update) for axis in axes}
    total = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    pools = (
        [[axis for axis in axes if axis.kind == kind] for kind in dict.fromkeys(axis.kind for axis in axes)]
        if within_kinds
        else [axes]
    )
    # sum over the criteria c of share_c f_c / sqrt(mean f_c^2), the mean over the units of a pool
    for name, share in criteria.items():
        for pool in pools:
            spread = float(torch.cat([found[axis.name][name] for axis in pool]).square().mean().sqrt()) if pool else 0.0
            for axis in pool:
                total[axis.name] += share * found[axis.name][name] / max(spread, 1e-300)
    return total


def _criteria(axis: Axis, weight: Part, update: Part) -> dict[Criterion, Tensor]:
    """The five criteria of each unit of an axis, each [size]."""
    names = dict.fromkeys(piece.param for piece in axis.slices)
    entries = sum(w.numel() // axis.size for name in names if (w := weight(name)) is not None)
    size, added = unit_products(axis, weight, weight).sqrt(), unit_products(axis, update, update).sqrt()
    inner, both = unit_products(axis, weight, update), size * added
    return {
        "magnitude": size,
        "average": size / max(entries, 1),
        "cosine": torch.where(both > 0, inner / both.clamp(min=1e-300), 0.0) + 1,
        "first": inner.abs(),
        "second": inner.square() / 2,
    }
