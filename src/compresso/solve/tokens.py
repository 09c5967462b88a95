"""Which tokens of a vocabulary are kept: the most used ones, with all that they are merged from."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from compresso.core.budget import InfeasibleBudget


def shares(rows: Iterable[Collection[int]], size: int) -> Tensor:
    """How often each of `size` tokens occurs in rows of ids, as a share of all tokens read [size], float64; zeros
    without any.
    """
    flat = torch.tensor([i for row in rows for i in row], dtype=torch.long)
    return torch.bincount(flat, minlength=size)[:size].double() / max(len(flat), 1)


def keep_tokens(
    used: Tensor,
    required: Collection[int],
    made_of: Callable[[int], Iterable[int]],
    *,
    threshold: float = 0.0,
    most: int | None = None,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Kept ids, ascending: tokens used more than a threshold, most used first, then the lowest ids that fill up to
    a multiple.

    Args:
        used: [size], share of the text that each token makes up.
        required: ids that are kept in any case.
        made_of: the ids that a token cannot do without, itself among them; an id beyond `size` is passed over.
        threshold: a token is not kept for its own sake where its share is at or below this.
        most: tokens that may be kept; a token that does not fit with all it is made of is passed over. None for no
            limit.
        multiple_of: the number of tokens is filled up to a multiple of this, where it neither passes `most` nor runs
            out of tokens.

    Returns:
        The ids.

    Raises:
        InfeasibleBudget: more than `most` have to be kept.

    >>> keep_tokens(torch.tensor([0.0, 0.0, 0.6, 0.0, 0.4]), [0], lambda i: (i, i - 1) if i else (0,), most=3)
    (0, 1, 2)
    """
    size = len(used)

    def parts(i: int) -> set[int]:
        return {part for part in made_of(i) if part < size}

    kept = set[int]().union(*(parts(i) for i in required if i < size))
    limit = size if most is None else most
    if len(kept) > limit:
        raise InfeasibleBudget(
            f"most={limit} tokens, but {len(kept)} of {size} must be kept: special ones and the alphabet; raise most to"
            " that"
        )
    order: list[int] = torch.sort(used, descending=True, stable=True).indices.tolist()  # pyright: ignore
    for i in order:
        if used[i] <= threshold or len(kept) == limit:
            break
        if len(more := kept | parts(i)) <= limit:
            kept = more
    target = min(
        -(-len(kept) // multiple_of) * multiple_of, size if most is None else most // multiple_of * multiple_of
    )
    for i in range(size):
        if len(kept) >= target:
            break
        if len(more := kept | parts(i)) <= target:
            kept = more
    return tuple(sorted(kept))
