"""Orders of input channels in which n:m pruning keeps more (E-Sparse, arXiv 2310.15929, section 3.3).

n of every m consecutive channels are kept in each row, so channels that matter should not meet in one group. A global
deal spreads them by their mean score; swaps between groups, inside blocks, then improve what is kept. Scores are [rows,
columns]; what is kept in a row and group is the sum of its n largest.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def kept(scores: Tensor, order: Tensor, n: int, m: int) -> float:
    """The sum of all scores that n:m pruning keeps with the channels in an order [columns]."""
    return float(scores[:, order].reshape(len(scores), -1, m).topk(n, dim=2).values.sum(dtype=torch.float64))


def dealt(scores: Tensor, m: int) -> Tensor:
    """Channels dealt to groups in turn by falling mean score, the first of equal ones first: an order [columns]."""
    groups = scores.shape[1] // m
    ranked = scores.mean(dim=0).argsort(descending=True, stable=True)
    return ranked.reshape(m, groups).T.reshape(-1)


def swapped(scores: Tensor, order: Tensor, n: int, m: int, *, block: int = 256, least: float = 1e-6) -> Tensor:
    """An order improved by swaps of two channels in different groups of a block, always the best one, while it is worth
    something.

    Args:
        scores: [rows, columns].
        order: to start from [columns].
        n, m: n of m are kept.
        block: places that are improved together, a multiple of m; the last block may be shorter.
        least: gain below which the search ends, as a share of what the block keeps; after as many swaps as it has
            places it ends, too.
    """
    result = order.clone()
    for begin in range(0, len(order), block):
        part = order[begin : begin + block]
        result[begin : begin + block] = part[_improved(scores[:, part], n, m, least)]
    return result


def _improved(scores: Tensor, n: int, m: int, least: float) -> Tensor:
    """As `swapped`, for one block from its own order: places [width]."""
    width = scores.shape[1]
    groups = torch.arange(width, device=scores.device).reshape(-1, m)  # the columns of each group
    group_of = torch.arange(width, device=scores.device) // m
    exchanged = scores.new_empty(width, width)  # [i, x]: what i's group keeps with column x in i's place
    now = scores.new_empty(len(groups))
    for g in range(len(groups)):
        exchanged[groups[g]], now[g] = _with_each(scores, groups[g], n)
    for _ in range(width):
        gain = exchanged + exchanged.T - now[group_of, None] - now[group_of]
        gain[group_of[:, None] == group_of] = 0
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= least * float(now.sum()):
            break
        i, j = divmod(best, width)
        g, h = int(group_of[i]), int(group_of[j])
        groups[g, groups[g] == i], groups[h, groups[h] == j] = j, i
        group_of[i], group_of[j] = h, g
        for touched in (g, h):
            exchanged[groups[touched]], now[touched] = _with_each(scores, groups[touched], n)
    return groups.flatten()


def _with_each(scores: Tensor, columns: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What a group keeps with every column of the block in the place of each of its own [m, width], and what it keeps
    now.
    """
    mine = scores[:, columns]
    rows: list[Tensor] = []
    for place in range(len(columns)):
        others = (
            torch.cat([mine[:, :place], mine[:, place + 1 :]], dim=1).topk(n, dim=1).values
        )  # n < m, so there are n
        rows.append(torch.maximum(scores, others[:, -1:]).sum(dim=0) + others[:, :-1].sum())
    return torch.stack(rows), mine.topk(n, dim=1).values.sum()


def best_order(scores: Tensor, n: int, m: int, *, block: int = 256, rows: int = 512) -> tuple[Tensor, dict[str, float]]:
    """The best of three orders: as it is, that with swaps, and dealt with swaps; and what each keeps, as a share of the
    first.

    Dealing alone can be worse than nothing. rows: swaps are chosen by so many rows at most, evenly spread; orders are
    compared by all.
    """
    step = max(1, -(-len(scores) // rows))
    sample = scores[::step]
    unchanged = torch.arange(scores.shape[1], device=scores.device)
    orders: dict[str, Tensor] = {"unchanged": unchanged}

    def starts() -> Iterator[tuple[str, Tensor]]:
        yield "swapped", unchanged
        yield "dealt and swapped", dealt(scores, m)

    for name, start in starts():
        orders[name] = swapped(sample, start, n, m, block=block)
    found = {name: kept(scores, order, n, m) for name, order in orders.items()}
    best = max(found, key=lambda name: found[name])  # the first of equal ones
    return orders[best], {
        name: value / found["unchanged"] if found["unchanged"] else 1.0 for name, value in found.items()
    }
