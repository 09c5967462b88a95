"""What charts and the tables in their place share: points, which of them none beats, and text that XML can hold."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compresso.report.removed import CHANNELS, HEAD_WIDTH, HEADS, HIDDEN, UnitsKept

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Point:
    """A model in a plot of quality against cost; `error` is a standard error of `y`, `mark` its place among the marks
    of all plots.
    """

    name: str
    mark: int
    x: float
    y: float
    error: float | None = None


def parts_of(cells: Sequence[UnitsKept]) -> list[str]:
    """The parts that any cell speaks of, in their order."""
    return [part for part in (HEADS, HEAD_WIDTH, CHANNELS, HIDDEN) if any(cell.part == part for cell in cells)]


def undominated(points: Sequence[Point], *, x_lower: bool, y_lower: bool) -> list[Point]:
    """Points than which none is better in one coordinate and at least as good in the other, by x."""

    def cost(point: Point) -> tuple[float, float]:
        return (point.x if x_lower else -point.x, point.y if y_lower else -point.y)

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in map(cost, points))

    return sorted((point for point in points if not beaten(cost(point))), key=lambda point: point.x)


def drawable(text: str) -> str:
    """The text with U+FFFD for each character that XML cannot hold, such as an escape."""
    return _NOT_XML.sub("\ufffd", text)
