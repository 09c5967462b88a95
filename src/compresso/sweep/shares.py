"""Shares of zeros that differ from layer to layer: the knobs of a search for them, and the grid they lie on.

On the grid counts of zeros are whole in every set of weights that compare with each other, where widths allow it, so
that what one layer keeps another gives.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass

from compresso.core.sparsity import count_of
from compresso.solve.evolve import Evolution


class ShareAllocation(StrEnum):
    """How shares of zeros are given to layers."""

    UNIFORM = "uniform"
    DP = "dp"
    EVOLVE = "evolve"


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShareSearch:
    """Where shares are looked for, and on what.

    Args:
        reach: most that a layer's share differs from the one asked for.
        step: of the grid; the nearest one on which counts are whole is taken.
        examples, batch: rows that candidates are compared on, at most, and rows a forward pass.
        evolution: length and breadth of the search; see `compresso.solve.evolve.Evolution`.
    """

    reach: Annotated[float, Gt(0), Lt(1)] = 0.15
    step: Annotated[float, Gt(0), Lt(1)] = 0.05
    examples: Annotated[int, Ge(1)] = 32
    batch: Annotated[int, Ge(1)] = 2
    evolution: Evolution = Evolution(generations=40, offspring=12, survivors=(4, 2))


Compared = Callable[[int, int], Sequence[tuple[int, int]]]
"""Rows and columns of a matrix -> how many sets of weights compare, and their size: (how many, size) of each size."""


def in_rows(rows: int, columns: int) -> list[tuple[int, int]]:
    """Each row by itself."""
    return [(rows, columns)]


def in_matrix(rows: int, columns: int) -> list[tuple[int, int]]:
    """The whole matrix."""
    return [(1, rows * columns)]


def in_blocks(block: int) -> Compared:
    """All rows of so many columns at a time."""

    def compared(rows: int, columns: int) -> list[tuple[int, int]]:
        return [(columns // block, rows * block), (1 if columns % block else 0, rows * (columns % block))]

    return compared


def share_grid(share: float, sizes: Sequence[int], reach: float, step: float) -> list[float]:
    """Shares around one, ascending, it among them, within [0, 1) and `reach`.

    sizes: of the sets of weights that compare; steps are whole counts in all of them, unless that makes a step more
    than twice as long.

    >>> share_grid(0.5, [192, 576], 0.1, 0.05)
    [0.3958333333333333, 0.4479166666666667, 0.5, 0.5520833333333334, 0.6041666666666666]
    >>> share_grid(0.5, [7, 5], 0.1, 0.05)
    [0.4, 0.45, 0.5, 0.55, 0.6]
    """
    common = math.gcd(*sizes)
    whole = max(round(step * common), 1)
    by = whole / common if whole / common <= 2 * step else step
    n = int(reach / by + 0.5)
    return [share + i * by for i in range(-n, n + 1) if 0 <= share + i * by < 1]


def zeros_at(share: float, sets: Sequence[tuple[int, int]]) -> int:
    """Zeros of all sets together, each losing its share. sets: how many, and their size."""
    return sum(n * count_of(share, size) for n, size in sets)
