"""What zeroing, rounding or a low rank leaves of the weights it works on, before anything is read; groups that fit
widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.rounding import bits_per_weight
from compresso.core.sparsity import parse_pattern
from compresso.errors import RecipeError
from compresso.sweep.targets import Groups, Where, chosen, matrix, names_of

LEAST_GROUP = 16
"""Inputs of the smallest group that takes another's place: below it scales weigh more than they save."""


@dataclass(frozen=True)
class Compressed:
    """Weights that a stage works on.

    Args:
        weights: how many.
        sparsity: share of them that becomes zero, 0..1.
        bits: of each, scales included, once it is packed; None where nothing is rounded.
        factored: how many numbers the factors of matrices of low rank have; None where none got one.
    """

    weights: int
    sparsity: float = 0.0
    bits: float | None = None
    factored: int | None = None


def zeroed_weights(model: PreTrainedModel, groups: Groups, share: float | None, pattern: str | None) -> Compressed:
    """Of a stage that zeroes a share (half, if it is not said) or leaves n of every m."""
    if pattern is not None:
        n, m = parse_pattern(pattern)
        share = 1 - n / m
    return Compressed(sum(map(math.prod, _sizes(model, groups))), 0.5 if share is None else share)


def rounded_weights(model: PreTrainedModel, groups: Groups, bits: int, group: int, symmetric: bool) -> Compressed:
    """Of a stage that rounds."""
    sizes = _sizes(model, groups)
    return Compressed(sum(map(math.prod, sizes)), bits=bits_per_weight(sizes, bits, group, symmetric))


class Grouped(Protocol):
    """A stage whose grids have a scale for each `group` of inputs, 0 for each row."""

    @property
    def group(self) -> int: ...

    @property
    def where(self) -> Where: ...


def fitting_group(stage: Grouped, model: PreTrainedModel, arch: Arch, *, experts: bool = False) -> int:
    """The largest group up to `stage.group` that divides it and the inputs of every linear; 0 stays.

    Raises RecipeError where it would fall below 16 without being asked for, naming the linear at which it does.
    """
    if not stage.group:
        return 0
    widths = {
        name: matrix(model, name).shape[1] for name in names_of(chosen(model, arch, stage.where, experts=experts))
    }
    found = math.gcd(stage.group, *widths.values())
    if found >= min(LEAST_GROUP, stage.group):
        return found
    odd = min(widths, key=lambda name: math.gcd(stage.group, widths[name]))
    of_all = f" ({found} divides the inputs of all)" if found > 1 else ""
    raise RecipeError(
        f"{odd} has {widths[odd]} inputs, no multiple of {stage.group}, and no group of"
        f" {min(LEAST_GROUP, stage.group)} or more fits in its place; give another group{of_all}, or add it to"
        " where.ignore"
    )


def other_group(stage: Grouped, model: PreTrainedModel, arch: Arch, *, experts: bool = False) -> list[str]:
    """A sentence where another group takes the place of the one that was asked for."""
    fits = fitting_group(stage, model, arch, experts=experts)
    if fits == stage.group:
        return []
    widths = {matrix(model, name).shape[1] for name in names_of(chosen(model, arch, stage.where, experts=experts))}
    odd = ", ".join(f"{width:,}" for width in sorted(widths) if width % stage.group)
    return [f"groups of {fits} inputs, the largest that fit, since {stage.group} does not divide {odd}"]


def _sizes(model: PreTrainedModel, groups: Groups) -> Sequence[tuple[int, ...]]:
    return [tuple(matrix(model, name).shape) for name in names_of(groups)]
