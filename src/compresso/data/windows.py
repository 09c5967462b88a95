"""Whether there is text enough to look at."""

from collections.abc import Sequence

from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.errors import DataError


def check_window(rows: Sequence[Row], window: int | None) -> None:
    """Raise DataError if plain text was cut into windows of this many tokens and does not fill one; None where it was
    not cut.
    """
    if window is not None and all(len(row["input_ids"]) < window for row in rows):
        n = sum(len(row["input_ids"]) for row in rows)
        raise DataError(
            f"the text has {counted(n, 'token')}, less than one window of {window}; give more text, or lower"
            " data.max_length"
        )
