"""How much the loss is expected to change when a unit leaves, read off weights and gradients: LLM-Pruner (arXiv
2305.11627, section 3.2).

A unit owns slices of several tensors that leave together (the rows of q, k, v and the columns of o that make a head).
Its score is found in three steps: entries get a salience, the entries of each slice are summed to one value a channel,
and the values of the coupled slices are reduced. A head is as many channels as its key has rows; reduction runs over
the slices channel by channel, then the channels add up.

Unusual: With grouped queries a key/value head has more query rows than key rows. They are added head by head to the
    channels of their own key/value head; the authors' code folds the query rows in another order, which pairs most of
    them with another architecture's head. A linear's bias counts with the rows of its weight. The authors' code passes
    biases over; the models it was written for have none. Products over slices are logarithms of products, because
    products of hundreds of small numbers underflow; the order is the same.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from compresso.core.axis import Axis

Importance = Literal["vector", "first", "second", "mixed", "l1", "l2"]
"""First-order Taylor terms summed with their signs ("vector") or by size ("first": element^1); second-order terms with
the diagonal Fisher information ("second": element^2); both orders ("mixed"); absolute and squared weights.
"""
Reduction = Literal["sum", "mean", "max", "prod", "last"]
"""What becomes of the values of coupled slices; "last" takes the slice that computes last (`o_proj`, `down_proj`) for
all.
"""

WITH_GRADIENT: tuple[Importance, ...] = ("vector", "first", "mixed")
"""Importances that need the gradient of a batch's loss."""
WITH_FISHER: tuple[Importance, ...] = ("second", "mixed")
"""Importances that need the mean of squared gradients of single examples."""

_TINY = torch.finfo(torch.float64).tiny


def salience(
    importance: Importance, weight: Tensor, gradient: Tensor | None = None, fisher: Tensor | None = None
) -> Tensor:
    """The salience of each entry of a weight, in its shape, float32 (section 3.2, equations 3 to 5); signed for
    "vector", else at least 0.

    Args:
        importance: which.
        weight: any shape, any floating dtype.
        gradient: of the loss, in the weight's shape.
        fisher: squared gradients of single examples' losses, averaged over the examples, in the weight's shape.

    Raises:
        ValueError: a gradient that the importance needs is missing.

    >>> gradient, fisher = torch.tensor([0.5, 3.0]), torch.tensor([0.25, 4.0])
    >>> salience("mixed", torch.tensor([2.0, -1.0]), gradient=gradient, fisher=fisher)
    tensor([0.5000, 5.0000])
    """
    w = weight.detach().float()
    if importance == "l1":
        return w.abs()
    if importance == "l2":
        return w.square()
    if importance in WITH_GRADIENT and gradient is None:
        raise ValueError(f"importance '{importance}' needs the gradient of the loss; give gradient")
    if importance in WITH_FISHER and fisher is None:
        raise ValueError(f"importance '{importance}' needs squared gradients of single examples; give fisher")
    first = (
        w * gradient.float()
        if gradient is not None and importance in WITH_GRADIENT
        else torch.zeros((), device=w.device)
    )
    if importance == "vector":
        return first
    if importance == "first":
        return first.abs()
    assert fisher is not None
    # the Hessian's diagonal is approximated by the squared gradients: |g w - w H_kk w / 2| (equation 5)
    second = w * fisher.float() * w
    return second.abs() if importance == "second" else (first - 0.5 * second).abs()


def unit_scores(
    axis: Axis,
    importance: Importance,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """The score of each unit of an axis [size], float64, on the CPU; higher is kept. Under "prod" it is the logarithm
    of the product.

    Args:
        axis: whose units are scored.
        importance: of each entry.
        parameters, gradients, fisher: name -> tensor, at least for the parameters that the axis slices.
        reduction: of the sums that a unit's slices give.

    Raises:
        ValueError: as `salience` does, and for the reduction "last" of an axis other than heads or channels, whose
            slices do not compute one after another.
    """
    if reduction == "last" and axis.kind not in ("head", "channel"):
        raise ValueError(f"axis {axis.name} has no slice that computes last; reduce by sum, mean, max or prod")
    values: dict[
        tuple[int | None, str, int], Tensor
    ] = {}  # (unit or None, module, start in it) -> what weight and bias add up to
    for piece in axis.slices:
        name = piece.param
        entries = salience(importance, parameters[name], (gradients or {}).get(name), (fisher or {}).get(name))
        key = (piece.unit, name.rpartition(".")[0], piece.start)
        if piece.unit is None:
            entries = piece.entries(entries, axis.size).reshape(axis.size * piece.width, -1)
        total = entries.sum() if piece.unit is not None else entries.sum(dim=1)
        values[key] = values[key] + total if key in values else total
    sized = {key: value.abs().double().cpu() for key, value in values.items()}
    if any(unit is not None for unit, *_ in sized):
        nothing = torch.zeros((), dtype=torch.float64)  # of a layer whose sub-layers were removed
        owned = [[value for (unit, *_), value in sized.items() if unit == k] for k in range(axis.size)]
        return torch.stack([_reduced(torch.stack(members or [nothing])[:, None], reduction) for members in owned])
    channels = channels_per_unit(axis)
    folded = [value.reshape(axis.size, -1, channels).sum(dim=1) for value in sized.values()]
    return _reduced(torch.stack(folded), reduction)


def channels_per_unit(axis: Axis) -> int:
    """Channels that make a unit: entries of its narrowest slice (head_dim for a head, with or without grouped queries;
    1 for all else).
    """
    return min(piece.width for piece in axis.slices)


def kept_units(size: int, channels: int, ratio: float) -> int:
    """Units kept when a ratio of them is removed: the fewest that hold int(size * channels * (1 - ratio)) channels.

    The authors' rule: truncate in channels, remove whole units only.

    >>> kept_units(32, 128, 0.6), kept_units(11008, 1, 0.6)
    (13, 4403)
    """
    return -(-int(size * channels * (1 - ratio)) // channels)


def _reduced(members: Tensor, reduction: Reduction) -> Tensor:
    """Coupled slices [slices, ..., channels] reduced over slices, then added up over channels: [...], float64."""
    if reduction == "prod":
        return torch.logsumexp(members.clamp(min=_TINY).log().sum(dim=0), dim=-1)
    if reduction == "max":
        return members.amax(dim=0).sum(dim=-1)
    if reduction == "last":
        return members[-1].sum(dim=-1)
    return (members.sum(dim=0) if reduction == "sum" else members.mean(dim=0)).sum(dim=-1)
