"""Drives chosen groups of weights to exactly zero while training goes on: HESSO's schedule and the half-space step it
comes from.

HESSO (only-train-once's public optimizer) splits N updates into P periods of T = N // P. In each, at t = 1 a set of
groups is chosen, and after every ordinary update its weights are multiplied by (T - t - 1) / (T - t). The factors
telescope: after the step t the weights carry (T - 1 - t) / (T - 1), and at t = T - 1 the last factor is 0 / 1, so the
zeros are exact and not small numbers. t = 0 only trains.

Half-space step (OTO, arXiv 2107.07467, LHSPG of LoRAShear, arXiv 2310.18356): a group whose trial update leaves the
half space around its old value, <trial, old> < eps |old|^2, becomes zero at once.
"""

from torch import Tensor


def shrink_factor(t: int, length: int) -> float:
    """What the weights of a period's groups are multiplied by after its step `t`; the steps of a period are 0 .. length
    - 1.

    Raises:
        ValueError: a period below 2 updates, which has no step to shrink in, and for a step outside it.

    >>> [shrink_factor(t, 4) for t in range(4)]
    [1.0, 0.6666666666666666, 0.5, 0.0]
    """
    if length < 2:
        raise ValueError(f"a period of {length} updates has none to shrink in; wanted at least 2")
    if not 0 <= t < length:
        raise ValueError(f"step {t} lies outside a period of {length} updates")
    return (length - t - 1) / (length - t) if t else 1.0


def keep_after(keep: float, period: int, periods: int) -> float:
    """The share kept after `period` of `periods` equal parts of what is removed; the last is `keep` itself,
    bit for bit.

    >>> keep_after(0.5, 1, 4), keep_after(0.7, 3, 3)
    (0.875, 0.7)
    """
    return keep if period == periods else 1 - (1 - keep) * period / periods


def leaves_half_space(inner: Tensor, squared: Tensor, eps: float) -> Tensor:
    """Which groups the half-space step makes zero [groups], bool: <trial, old> < eps |old|^2.

    Args:
        inner: <trial, old> of each group [groups].
        squared: |old|^2 of each group [groups].
        eps: in [0, 1); 0 asks that the trial turned by more than a right angle.

    >>> import torch
    >>> leaves_half_space(torch.tensor([-0.1, 0.2, 0.6]), torch.tensor([1.0, 1.0, 1.0]), 0.5)
    tensor([ True,  True, False])
    """
    return inner < eps * squared
