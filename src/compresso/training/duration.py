"""How long a training phase lasts: in updates, or in epochs over the data."""

import math
import re
from typing import Annotated

from pydantic import AfterValidator

from compresso.errors import RecipeError

_EPOCHS = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*epochs?\s*$")


def updates(duration: int | str, examples: int, batch: int) -> int:
    """Updates of a duration, for `examples` training examples and `batch` examples an update.

    >>> updates(200, examples=1000, batch=8)
    200
    >>> updates("2 epochs", examples=1001, batch=8)
    252

    Raises:
        RecipeError: if it is negative or not understood.
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    match = _EPOCHS.match(duration) if isinstance(duration, str) else None
    if match is None:
        raise RecipeError(f"duration {duration!r} is not understood; wanted updates (200) or epochs ('2 epochs')")
    return math.ceil(float(match[1]) * math.ceil(examples / batch))


def part(total: int, turn: int, turns: int) -> int:
    """What falls to one of several turns, from 1, if a total is shared out evenly; the parts add up to it.

    >>> [part(10, turn, 4) for turn in (1, 2, 3, 4)]
    [2, 3, 2, 3]
    """
    return total * turn // turns - total * (turn - 1) // turns


def _understood(duration: int | str) -> int | str:
    try:
        updates(duration, 1, 1)
    except RecipeError as error:
        raise ValueError(str(error)) from error  # so that the knob is named where knobs are validated
    return duration


Duration = Annotated[int | str, AfterValidator(_understood)]
"""An integer is a number of updates; "2 epochs" or "0.5 epoch" is passes over the training examples."""


def shortened(phases: list[int], most: int | None) -> list[int]:
    """Phases scaled down so that together they take at most `most` updates; a phase that was there keeps at least one.

    >>> shortened([100, 400, 100], 60)
    [10, 40, 10]
    """
    total = sum(phases)
    if most is None or total <= most:
        return phases
    scaled = [max(1, phase * most // total) if phase else 0 for phase in phases]
    scaled[scaled.index(max(scaled))] += most - sum(scaled)
    return scaled
