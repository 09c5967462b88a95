"""What changes over a run: the target sparsity of mask training and the factor on a learning rate.

Every function returns a closure from the number of updates done so far (0 before the first) to a number. Counting is in
optimizer updates, never in micro-batches, so accumulation does not change a schedule.
"""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]


def progress(shape: Literal["linear", "cubic"], warmup: int) -> Schedule:
    """Share of the way to the final target, 0 to 1, by a ramp's name.

    Raises:
        ValueError: an unknown shape.

    >>> progress("linear", 10)(5), progress("cubic", 10)(5), progress("linear", 0)(0)
    (0.5, 0.875, 1.0)
    """
    if shape == "linear":
        return lambda update: _progress(update, warmup)
    if shape == "cubic":
        return lambda update: 1 - (1 - _progress(update, warmup)) ** 3
    raise ValueError(f"ramp shape {shape!r} is unknown; wanted 'linear' or 'cubic'")


def rate(name: Literal["constant", "linear", "cosine"], total: int, warmup: int = 0) -> Schedule:
    """A learning-rate factor by its name.

    Raises:
        ValueError: an unknown name.
    """
    if name == "constant":
        return constant()
    if name == "linear":
        return linear(total, warmup)
    if name == "cosine":
        return cosine(total, warmup)
    raise ValueError(f"schedule {name!r} is unknown; wanted 'constant', 'linear' or 'cosine'")


def rate_for_width(lr: float, at: int | None, width: int) -> float:
    """A learning rate meant for hidden size `at`, for a model of hidden size `width`: lr (at / width)^0.75; lr itself
    if `at` is None.

    Narrow models bear and need higher rates. The exponent lies between no rule and the 1 / width of maximal-update
    parametrisation (Yang et al., arXiv 2203.03466); it takes the usual 5e-4 of wide models to the best rates found at
    hidden sizes 192 (5e-3) and 64 (1e-2).

    >>> round(rate_for_width(5e-4, 4096, 192), 4)
    0.005
    """
    return lr if at is None else lr * (at / width) ** 0.75


def constant() -> Schedule:
    """Learning-rate factor 1."""

    def same(update: int) -> float:
        _check_update(update)
        return 1.0

    return same


def linear(total: int, warmup: int = 0) -> Schedule:
    """Learning-rate factor that rises linearly over `warmup` updates, then falls linearly to 0 at `total`.

    Raises:
        ValueError: unless 0 <= warmup < total.

    >>> [linear(4)(update) for update in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_rate(total, warmup)
    return lambda update: _warmed(update, warmup, lambda: max(0.0, (total - update) / (total - warmup)))


def cosine(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Learning-rate factor that rises linearly over `warmup` updates, then falls along half a cosine to `floor` at
    `total`.

    Raises:
        ValueError: unless 0 <= warmup < total and 0 <= floor <= 1.
    """
    _check_rate(total, warmup)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is a share of the learning rate; give a number in [0, 1]")

    def falling(update: int) -> float:
        done = min(1.0, (update - warmup) / (total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return lambda update: _warmed(update, warmup, lambda: falling(update))


def _progress(update: int, warmup: int) -> float:
    """Share of the warm-up that is over, in [0, 1]."""
    _check_update(update)
    return min(1.0, update / warmup) if warmup else 1.0


def _warmed(update: int, warmup: int, after: Callable[[], float]) -> float:
    _check_update(update)
    return update / warmup if update < warmup else after()


def _check_update(update: int) -> None:
    if update < 0:
        raise ValueError(f"update {update} is before the first; updates are counted from 0")


def _check_rate(total: int, warmup: int) -> None:
    if not 0 <= warmup < total:
        raise ValueError(
            f"warmup={warmup} of total={total} updates leaves no update at a falling rate; wanted 0 <= warmup < total"
        )
