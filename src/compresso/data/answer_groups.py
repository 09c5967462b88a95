"""Which windows of questions lie on one side of a split: those of one title, or of one text where none has a title."""

import hashlib
from collections.abc import Sequence

from compresso.core.plain_values import shown
from compresso.core.row import Row


def by_group(rows: Sequence[Row], n: int) -> set[int]:
    """Places of at least `n` windows, of whole groups, which a digest of their names puts in order; asked for as many
    as it gave, it gives the same ones.
    """
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        assert "window" in row  # rows of this task have it
        members.setdefault(row["window"].group, []).append(place)
    found: set[int] = set()
    for group in sorted(members, key=_digest):
        if len(found) >= n:
            break
        found.update(members[group])
    return found


def of_one_group(rows: Sequence[Row]) -> str:
    """Why windows cannot be divided, and the cure: all are of one title, or of one text; "" where there are several."""
    windows = [row["window"] for row in rows if "window" in row]
    groups, texts = {one.group for one in windows}, {one.context for one in windows}
    if len(groups) != 1:
        return ""
    if groups == texts:
        return "all of one text, which is not divided; give questions about other texts, too"
    without = ", or leave 'title' out, and they are divided by their texts" if len(texts) > 1 else ""
    return f"all of the title {shown(groups.pop())}, which is not divided; give questions of other titles, too{without}"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
