"""Which entries of a matrix become zero: scores, and selections of an exact number of entries with ties broken by
index.

`n:m` means that n of every m consecutive inputs are KEPT, as hardware and papers write it. In the public code of
SparseGPT, Wanda and OWL `prune_n` counts those that are removed; for 2:4 and 4:8 both readings agree, for 1:4 they do
not.

Everything is removed exactly as often as asked, floor(share * entries), the lowest index first among equal scores. That
code compares with the entry at that index of the sorted scores by `<=`, so one more entry goes, and every one that ties
with it: `at_most_threshold`.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

_COMPARED = 8
"""Entries of a group up to which comparing each with each is faster than selecting."""

_LONG = 4096
"""Entries of a row from which on counting digits is faster than selecting."""


def parse_pattern(text: str) -> tuple[int, int]:
    """n and m of "n:m", n kept of m.

    Raises:
        ValueError: unless 1 <= n < m.

    >>> parse_pattern("2:4")
    (2, 4)
    """
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={text!r}: wanted n:m, n kept of every m inputs, such as 2:4")
    return int(match[1]), int(match[2])


def wanda_score(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 [out, in], float32 (Wanda, arXiv 2306.11695, eq. 1).

    Args:
        weight: [out, in].
        squares: sum, or mean, of the squared inputs [in].
    """
    return weight.float().abs() * squares.float().sqrt()


def count_of(share: float, entries: int) -> int:
    """floor(share * entries), as if share were the decimal number it is written as.

    >>> count_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(share * entries + 1e-9)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` entries of lowest score in each row, bool, the shape of `scores` [rows, columns]; the first ones
    among equals.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    cut = _cut(scores, count)
    chosen = scores <= cut
    if bool((chosen.sum(dim=1) != count).any()):  # more than one entry of a row ties with its cut
        below, equal = scores < cut, scores == cut
        chosen = below | (equal & (equal.cumsum(dim=1) <= count - below.sum(dim=1, keepdim=True)))
    return chosen


def _cut(scores: Tensor, count: int) -> Tensor:
    """The score at place `count`, from 1, of each row in ascending order [rows, 1]."""
    rows, columns = scores.shape
    if rows == 1 and columns > _LONG and scores.dtype == torch.float32 and bool(scores.amin() >= 0):
        return _cut_by_digits(scores[0], count).reshape(1, 1)
    from_top = columns - count + 1  # the shorter way: half as many entries are moved
    if count <= from_top:
        return scores.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return scores.topk(from_top, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _cut_by_digits(scores: Tensor, count: int) -> Tensor:
    """As `_cut` for one long row of float32 that are not negative: bits read as whole numbers order them, so the upper
    half of the bits says, counted, in which of 2^15 bins the score lies, and only that bin is searched.
    """
    upper = scores.view(torch.int32) >> 16
    ends = torch.bincount(upper, minlength=1).cumsum(dim=0)
    bin_of = int(torch.searchsorted(ends, count))
    before = int(ends[bin_of - 1]) if bin_of else 0
    return scores[upper == bin_of].kthvalue(count - before).values


def lowest_share(scores: Tensor, share: float) -> Tensor:
    """The lowest floor(share * entries) entries of the whole of `scores` [rows, columns], bool; the first ones among
    equals.
    """
    return lowest(scores.reshape(1, -1), count_of(share, scores.numel())).reshape(scores.shape)


def lowest_in_rows(scores: Tensor, share: float) -> Tensor:
    """The lowest floor(share * columns) entries of each row of `scores` [rows, columns], bool; the first ones among
    equals.
    """
    return lowest(scores, count_of(share, scores.shape[1]))


def lowest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The lowest m - n of every m consecutive entries of each row of `scores` [rows, columns], bool: n are kept of m.

    Raises:
        ValueError: m does not divide the columns.
    """
    if scores.shape[1] % m:
        raise ValueError(f"{n}:{m} needs a multiple of {m} inputs, and there are {scores.shape[1]}")
    if m > _COMPARED:
        return lowest(scores.reshape(-1, m), m - n).reshape(scores.shape)
    entries = scores.reshape(-1, m).T.contiguous()
    before = torch.zeros(
        entries.shape, dtype=torch.int8, device=scores.device
    )  # how many of its group come before an entry
    for j in range(1, m):
        smaller = entries[j] < entries[:j]
        before[:j] += smaller
        before[j] += j - smaller.sum(dim=0, dtype=torch.int8)
    return (before < m - n).T.reshape(scores.shape)


def at_most_threshold(scores: Tensor, share: float) -> Tensor:
    """The entries of `scores` at or below its entry at int(share * entries) in ascending order, bool: one more than
    asked, and all ties.

    As the public code of SparseGPT, and Wanda's for magnitude, choose; share 1 has no such entry there, and takes all
    here.
    """
    if share <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    index = min(int(share * scores.numel()), scores.numel() - 1)
    return scores <= scores.flatten().kthvalue(index + 1).values


def lowest_mass(scores: Tensor, share: float, tolerance: float = 1e-3) -> tuple[Tensor, float]:
    """Wanda's variant (its public code, `use_variant`): of each row the lowest scores whose sum is at most alpha of the
    row's.

    One alpha for the matrix is found by bisection in [0, 0.8], until the share of entries that go is within `tolerance`
    of `share` or the bracket is as narrow. Rows lose different numbers of entries. Where the lowest score alone is more
    than alpha of the row, the row loses none (there, an index of -1 is an error). A share above about 0.9 may be out of
    reach; the caller sees what came of it.

    Returns:
        Which entries go [rows, columns], bool, and alpha.
    """
    order = scores.argsort(dim=1, stable=True)
    sums = scores.gather(1, order).double().cumsum(dim=1)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        first = sums <= alpha * sums[:, -1:]
        found = float(first.double().mean())
        if abs(found - share) <= tolerance or high - low < tolerance:
            return torch.zeros_like(first).scatter_(1, order, first), alpha
        low, high = (low, alpha) if found > share else (alpha, high)
        alpha = (low + high) / 2


def outliers(scores: Sequence[Tensor], times: float) -> float:
    """Percentage of a block's scores above `times` their mean (OWL, arXiv 2310.05175, eq. 1); scores are those of all
    its matrices.
    """
    n = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / n
    return 100 * sum(int((score > times * mean).sum()) for score in scores) / n


def outlier_weighted(outlying: Sequence[float], share: float, spread: float) -> list[float]:
    """Sparsity of each block from its percentage of outliers, `share` on average: more outliers, less sparsity (OWL,
    section 3.2).

    They lie within [share - 2 spread, share + 2 spread], 2 spread apart, and at 0.01 at least. Blocks that are all
    alike get `share`.

    >>> [round(value, 6) for value in outlier_weighted([1.2, 3, 2, 5], 0.7, 0.08)]
    [0.767368, 0.691579, 0.733684, 0.607368]
    """
    low, high = min(outlying), max(outlying)
    if low == high:
        return [share] * len(outlying)
    scaled = [(value - low) / (high - low) * 2 * spread for value in outlying]
    mean = sum(scaled) / len(scaled)
    return [max(share - value + mean, 0.01) for value in scaled]
