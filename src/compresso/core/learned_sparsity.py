"""How many entries of a matrix or row become zero, learned by gradient (BESA, arXiv 2402.16880, sections 3.1 and 3.2).

Which of them go first is fixed: entries have ranks, 0 for the least important of a row. What is learned is a mixture
over rates:

    rates     p_1 > p_2 > ... > p_D, shares of a row that may become zero
    mixture   b = softmax(logits), or softmax(sigmoid(logits)) as the authors' code has it (`smooth`)
    share     a = sum over d of b_d p_d, the learned share of zeros
    rank k    leaves with probability P(k) = sum of b_d over the rates that take more than k entries: P falls with k,
              and its mean over the ranks is a, but for rounding down

The forward pass zeroes the first floor(columns * a) ranks of each row; gradients pass as if it had multiplied by
1 - P. Logits behind a sigmoid lie between 0 and 1, so that with `smooth` only shares between .376 and .624 can be
reached at all; see `reachable`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.quantisers import straight_through

_STEEPEST = 1e5
"""Slope of logits over rates up to which one is looked for."""
_HALVINGS = 80


def candidate_rates(step: float, least: float = 0.0, most: float = 1.0) -> Tensor:
    """Rates from `most` down to `least`, about `step` apart [D], float64.

    Raises:
        ValueError: there would be fewer than two.

    >>> candidate_rates(0.5).tolist()
    [1.0, 0.5, 0.0]
    """
    steps = round((most - least) / step)
    if not (0 <= least < most <= 1 and steps >= 1):
        raise ValueError(f"rates from {least} to {most} in steps of {step} are fewer than two; wanted a smaller step")
    return torch.linspace(most, least, steps + 1, dtype=torch.float64)


def mixture(logits: Tensor, smooth: bool = False) -> Tensor:
    """Weights of the rates [groups, D], float64, from logits [groups, D] of any float type."""
    wide = logits.double()
    return (wide.sigmoid() if smooth else wide).softmax(dim=-1)


def shares(mixed: Tensor, rates: Tensor) -> Tensor:
    """Learned share of zeros of each group [groups], float64; mixed [groups, D], rates [D]."""
    return mixed @ rates


def prune_probability(mixed: Tensor, rates: Tensor, columns: int) -> Tensor:
    """Probability that the entry of a rank leaves [groups, columns]; mixed [groups, D], rates [D] descending.

    >>> prune_probability(torch.tensor([[0.25, 0.5, 0.25]]), candidate_rates(0.5), 4)
    tensor([[0.7500, 0.7500, 0.2500, 0.2500]])
    """
    taken = counts_of(rates, columns).cpu()
    reach = (taken.unsqueeze(1) > torch.arange(columns)).sum(dim=0)  # rates that take more than k entries: the first
    sums = torch.cat([mixed.new_zeros(len(mixed), 1), mixed.cumsum(dim=1)], dim=1)
    return sums[:, reach.to(mixed.device)]


def ranks_of(scores: Tensor) -> Tensor:
    """Place of each entry among those of its row in ascending order [rows, columns], 0 for the lowest, the first among
    equals first; int16 where that holds them, since they lie beside every weight.
    """
    order = scores.argsort(dim=1, stable=True)
    small = torch.int16 if scores.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    places = torch.arange(scores.shape[1], dtype=small, device=scores.device).expand(scores.shape)
    return torch.empty_like(scores, dtype=small).scatter_(1, order, places)


def counts_of(share: Tensor, columns: int) -> Tensor:
    """floor(share * columns) of each group [groups], whole numbers, as if shares were the decimal numbers they are
    close to.
    """
    return (share.double() * columns + 1e-9).floor().clamp(0, columns).long()


def first_ranks(ranks: Tensor, counts: Tensor) -> Tensor:
    """The entries whose rank is below the count of their row, bool; ranks [rows, columns], counts [rows] or [1]."""
    return ranks < counts.unsqueeze(1)


def learned_mask(probability: Tensor, ranks: Tensor, counts: Tensor) -> Tensor:
    """1 for entries that stay and 0 for those that leave, with the gradient of 1 - P (straight through).

    Args:
        probability: P by rank [groups, columns]; one group for all rows, or one a row.
        ranks: of the entries [rows, columns].
        counts: entries that leave, by group [groups].

    Returns:
        [rows, columns], in the dtype of `probability`, exactly 0 or 1.
    """
    of_entries = probability.expand(len(ranks), -1).gather(1, ranks.long())
    return straight_through(1 - of_entries, (~first_ranks(ranks, counts)).to(of_entries.dtype))


def reachable(rates: Tensor, smooth: bool = False) -> tuple[float, float]:
    """The least and the greatest share that some logits have, neither reached by finite ones.

    With `smooth` weights of two rates differ by e at most, so that the extremes give the rates on one side of a place
    e times the weight of those on the other.

    >>> low, high = reachable(candidate_rates(0.01), smooth=True)
    >>> round(low, 3), round(high, 3), reachable(candidate_rates(0.01))
    (0.376, 0.624, (0.0, 1.0))
    """
    if not smooth:
        return float(rates.min()), float(rates.max())
    return float(_extreme(rates, high=False)[0]), float(_extreme(rates, high=True)[0])


def logits_for(share: float, rates: Tensor, smooth: bool = False) -> Tensor:
    """Logits [D], float64, whose learned share is `share`: a line over the rates, flat where the share is their mean.

    Without `smooth` the mixture is then, of all with that share, the nearest to the uniform one.

    Raises:
        ValueError: the share cannot be reached.
    """
    low, high = reachable(rates, smooth)
    if not low < share < high:
        raise ValueError(f"share={share} is out of reach: these rates and logits give {low:.3f} to {high:.3f}")
    middle = _extreme(rates, high=share > float(rates.mean()))[1] if smooth else rates.mean()
    below, above = -_STEEPEST, _STEEPEST
    for _ in range(_HALVINGS):
        slope = (below + above) / 2
        found = float(shares(mixture(slope * (rates - middle), smooth), rates))
        if abs(found - share) < 1e-12:
            break
        below, above = (slope, above) if found < share else (below, slope)
    return (below + above) / 2 * (rates - middle)


def _extreme(rates: Tensor, high: bool) -> tuple[Tensor, Tensor]:
    """The greatest, or least, share whose weights differ by a factor of e at most, and the rate where they change."""
    heavy = torch.ones(len(rates), len(rates), dtype=rates.dtype).tril()  # row i: rates 0 to i, the greatest ones
    weight = torch.where((heavy if high else 1 - heavy) > 0, torch.e, 1.0).to(rates.dtype)
    found = weight @ rates / weight.sum(dim=1)
    place = int(found.argmax() if high else found.argmin())
    return found[place], (rates[place] + rates[min(place + 1, len(rates) - 1)]) / 2


@dataclass(frozen=True)
class Landed:
    """Zeros of the rows of several matrices, an exact number in all.

    Args:
        counts: of each matrix' rows [rows].
        shift: what was added to every learned share, the same for all.
    """

    counts: Sequence[Tensor]
    shift: float


def landed(
    learned: Sequence[Tensor], columns: Sequence[int], zeros: int, rates: tuple[float, float] = (0.0, 1.0)
) -> Landed:
    """Shift all shares alike, within the rates, until the rows lose exactly so many entries together.

    Rows lose floor(columns * (share + shift)); what is then missing goes to the rows whose rounding down took most, one
    entry each, the first among equals. Where no whole numbers within the rates make up the total, rows may pass them
    by less than one entry.

    Args:
        learned: shares of each matrix' rows [rows].
        columns: entries of a row, by matrix.
        zeros: entries that leave in all.
        rates: the least and the greatest share that a row may lose.

    Raises:
        ValueError: no counts within the rates are so many.

    >>> landed([torch.tensor([0.9, 0.9, 0.9, 0.6])], [10], 34, (0.0, 0.9)).counts[0].tolist()
    [9, 9, 9, 7]
    """
    share = torch.cat([one.double() for one in learned])
    width = torch.cat([torch.full((len(one),), n, device=one.device) for one, n in zip(learned, columns, strict=True)])
    least, most = _within(width, rates, zeros)

    def counted(shift: float) -> Tensor:
        return ((share + shift) * width + 1e-9).floor().long().maximum(least).minimum(most)

    shift = _largest_within(lambda moved: int(counted(moved).sum()), zeros)
    counts = counted(shift)
    missing = (share + shift) * width - counts
    while (left := zeros - int(counts.sum())) > 0:
        open_ = missing.masked_fill(counts >= most, -torch.inf)
        chosen = open_.argsort(descending=True, stable=True)[: min(left, int((counts < most).sum()))]
        counts[chosen] += 1
        missing[chosen] -= 1
    return Landed(torch.split(counts, [len(one) for one in learned]), shift)


def _within(width: Tensor, rates: tuple[float, float], zeros: int) -> tuple[Tensor, Tensor]:
    """The fewest and the most entries that each row may lose [rows]: whole numbers within the rates, or around them on
    the side where those do not make up the total. Raises ValueError where these do not, either.
    """
    low, high = (rate * width.double() for rate in rates)
    least, most = (low - 1e-9).ceil().long(), (high + 1e-9).floor().long()
    if zeros < int(least.sum()) or bool((least > most).any()):
        least = (low + 1e-9).floor().long()
    if zeros > int(most.sum()):
        most = (high - 1e-9).ceil().long()
    if not int(least.sum()) <= zeros <= int(most.sum()):
        raise ValueError(f"zeros={zeros}: wanted {int(least.sum())} to {int(most.sum())}, what may leave")
    return least, most


def _largest_within(total: Callable[[float], int], wanted: int) -> float:
    """A shift at which a total that grows with it is as wanted, or the last at which it is below."""
    low, high, tried = -1.0, 1.0, 0.0
    for _ in range(_HALVINGS):
        found = total(tried)
        if found == wanted:
            return tried
        low, high = (tried, high) if found < wanted else (low, tried)
        tried = (low + high) / 2
    return low


def channel_error(output: Tensor, dense: Tensor) -> Tensor:
    """Mean over channels of |output - dense|^2 / |dense|^2, sums over tokens, float32 []; both [..., channels].

    A channel that is 0 in all dense outputs has no size to be measured by, and counts nothing.
    """
    flat, wanted = (one.reshape(-1, one.shape[-1]).float() for one in (output, dense))
    size = wanted.square().sum(dim=0)
    apart = (flat - wanted).square().sum(dim=0)
    return torch.where(size > 0, apart / size.clamp(min=torch.finfo(size.dtype).tiny), 0).mean()
