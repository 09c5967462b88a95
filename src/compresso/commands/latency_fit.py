"""Times of modules from times of whole models: least squares with terms that are not negative.

A model takes a fixed time; each attention that is there takes a time of its own and one for each of its key/value
heads, each FFN one of its own and one for each of its channels. Errors count in proportion to the time, so that small
models are met as well as large ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

LEAST = 6
"""Models of different shapes: one more than there are terms."""
TERMS = ("fixed", "an attention", "a key/value head", "an FFN", "a channel")


@dataclass(frozen=True)
class Fitted:
    """Milliseconds by term.

    Args:
        terms: one for each of `TERMS`.
        error: the largest relative miss.
    """

    terms: tuple[float, ...]
    error: float

    def curve(self, kind: int, units: int) -> dict[int, float]:
        """Units of a module -> milliseconds: none, one and all. kind: 0 for attention, 1 for an FFN."""
        own, each = self.terms[1 + 2 * kind], self.terms[2 + 2 * kind]
        return {0: 0.0} | {n: own + each * n for n in (1, units)}


def fit_times(models: Sequence[Sequence[tuple[int, int]]], milliseconds: Sequence[float]) -> Fitted:
    """Fit the terms.

    Args:
        models: key/value heads and channels of each layer of each model; 0 for what is not there.
        milliseconds: of each model, positive.

    Raises:
        ValueError: fewer than `LEAST` models of different shapes.
    """
    different = {tuple(widths) for widths in models}
    if len(different) < LEAST:
        raise ValueError(
            f"{len(different)} models of different shapes cannot tell {len(TERMS)} terms apart; {LEAST} are wanted"
        )
    rows = np.array(
        [
            [1.0, *(float(sum(f(one[kind]) for one in widths)) for kind in (0, 1) for f in (bool, int))]
            for widths in models
        ]
    )
    times = np.asarray(milliseconds, dtype=np.float64)
    scale = np.maximum(np.abs(rows).max(axis=0), 1.0)  # channels count in thousands
    found, _ = nnls(rows / scale / times[:, None], np.ones(len(times)))
    terms = found / scale
    return Fitted(tuple(float(term) for term in terms), float(np.abs(rows @ terms / times - 1).max()))


def shapes_to_fit(heads: int, channels: int, layers: int, step: int = 1) -> list[list[tuple[int, int]]]:
    """Shapes that tell the terms apart: all, fewer units of each kind, of both, fewer layers, layers without one kind.

    Args:
        heads, channels, layers: of the dense model.
        step: channels come in multiples of this.

    >>> [len(widths) for widths in shapes_to_fit(3, 1536, 30)]
    [30, 30, 30, 30, 30, 30, 30, 15]
    """
    few, most = max(1, heads // 3), max(1, (2 * heads) // 3)

    def part(share: float) -> int:
        return min(channels, max(step, round(channels * share / step) * step))

    half = (layers + 1) // 2
    shapes = [
        [(heads, channels)] * layers,
        [(few, channels)] * layers,
        [(heads, part(0.5))] * layers,
        [(most, part(0.25))] * layers,
        [(few, part(0.75))] * layers,
        [(heads, channels)] * half + [(0, channels)] * (layers - half),
        [(heads, part(0.5))] * half + [(heads, 0)] * (layers - half),
        [(heads, channels)] * half,
    ]
    return [list(widths) for widths in dict.fromkeys(tuple(widths) for widths in shapes)]
