"""A part of a set of items in which every kind has its share: for a first look at an evaluation that takes days."""

import random
from collections.abc import Hashable, Sequence

from compresso.errors import DataError

Limit = int | float
"""A number of items, or a share of them in (0, 1)."""


def limit_of(text: str | int | None) -> Limit | None:
    """How much is asked for: a number of items, or "5%" of them.

    Raises:
        DataError: neither, or nothing of it is left.

    >>> limit_of("5%"), limit_of("40"), limit_of(None)
    (0.05, 40, None)
    """
    if text is None:
        return None
    words = str(text).strip()
    try:
        value = float(words[:-1]) / 100 if words.endswith("%") else int(words)
    except ValueError:
        value = 0
    if not value > 0 or (words.endswith("%") and value > 1):  # also refuses NaN
        raise DataError(f"--limit {text}: wanted a number of items, at least 1, or a share such as 5%")
    return None if words.endswith("%") and value == 1 else value


def stratified(
    strata: Sequence[Hashable], limit: Limit | None, seed: int = 0, parts: Sequence[Hashable] | None = None
) -> list[int]:
    """Places of a part of the items, in order, each stratum with its share of it.

    Args:
        strata: of each item, the kind it belongs to.
        limit: how many; a share is rounded, and at least one. None, or more than there are, takes all.
        seed: of the draw.
        parts: of each item, what has one at least where the limit is no smaller than their number; a stratum lies in
            one of them. None asks for nothing beyond shares.

    Shares that are no whole numbers are rounded down, and what is left goes to the largest remainders, of equals to
    those that the seed draws first. A part without any is given one of the largest stratum of the part that has most.
    """
    n = len(strata)
    if limit is None or limit >= n:
        return list(range(n))
    wanted = max(1, round(limit * n)) if isinstance(limit, float) else limit
    members: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(place)
    drawn = random.Random(seed)
    exact = {stratum: wanted * len(places) / n for stratum, places in members.items()}
    counts = {stratum: int(share) for stratum, share in exact.items()}
    order = list(members)
    drawn.shuffle(order)
    order.sort(key=lambda stratum: -(exact[stratum] - counts[stratum]))
    for stratum in order[: wanted - sum(counts.values())]:
        counts[stratum] += 1
    if parts is not None:
        _one_each_(counts, exact, {stratum: parts[places[0]] for stratum, places in members.items()})
    return sorted(place for stratum, places in members.items() for place in drawn.sample(places, counts[stratum]))


def _one_each_(counts: dict[Hashable, int], exact: dict[Hashable, float], part_of: dict[Hashable, Hashable]) -> None:
    """Move single items from the fullest parts to those that have none, if there are items enough."""
    held = dict.fromkeys(part_of.values(), 0)
    for stratum, n in counts.items():
        held[part_of[stratum]] += n
    if sum(held.values()) < len(held):
        return
    for part in [part for part, n in held.items() if not n]:
        richest = max(held, key=held.__getitem__)
        giver = max((one for one in counts if part_of[one] == richest), key=lambda one: counts[one])
        taker = max((one for one in counts if part_of[one] == part), key=lambda one: exact[one])
        counts[giver] -= 1
        counts[taker] += 1
        held[richest] -= 1
        held[part] += 1
