"""Charts where altair and vl-convert are installed (the extra `report`), else tables of the same numbers."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from markupsafe import Markup

from compresso.report import chart_tables
from compresso.report.marks import Point
from compresso.report.removed import UnitsKept

DRAWN_BY = ("altair", "vl_convert")
"""The packages that draw."""


def can_draw() -> bool:
    """Whether charts are drawn; tables stand in their place otherwise."""
    return all(find_spec(name) is not None for name in DRAWN_BY)


def heat_map(cells: Sequence[UnitsKept]) -> Markup:
    """What is kept of each part of each layer.

    Args:
        cells: one for each part of a layer.

    Returns:
        An `<svg>`, or a `<table>` in a region of its own.
    """
    return _altair().heat_map(cells) if can_draw() else chart_tables.heat_map(cells)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    *,
    percent: bool = False,
    dashed: Sequence[str] = (),
    axis: str = "update",
    order: Sequence[str] = (),
) -> Markup:
    """Lines over updates.

    Args:
        lines: (update, value) of each line, by its name.
        label: what the chart shows, for those who cannot see it.
        percent: whether values are shares.
        dashed: names of lines that are drawn so.
        axis: what the lines run over.
        order: names that several charts have in common, so that each has its colour in all of them.

    Returns:
        As `heat_map`.
    """
    if can_draw():
        return _altair().curves(lines, label, percent=percent, dashed=dashed, axis=axis, order=order)
    return chart_tables.curves(lines, label, percent=percent, axis=axis)


def trade_off(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    label: str,
    *,
    x_lower: bool,
    y_lower: bool,
    percent: bool = False,
) -> Markup:
    """Quality against cost.

    Args:
        points: one for each model.
        x_title, y_title: of the axes.
        label: what the chart shows, for those who cannot see it.
        x_lower, y_lower: whether less is better.
        percent: whether quality is a share.

    Returns:
        As `heat_map`.
    """
    if can_draw():
        return _altair().trade_off(points, x_title, y_title, label, x_lower=x_lower, y_lower=y_lower, percent=percent)
    return chart_tables.trade_off(points, x_title, y_title, label, percent=percent)


def _altair() -> Any:
    """The module that draws, imported when something is drawn: altair takes a second."""
    from compresso.report import altair_charts

    return altair_charts
