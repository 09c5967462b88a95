"""Tables in the place of charts, of the same numbers, for where altair and vl-convert are not installed."""

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from compresso.report.marks import Point, drawable, parts_of
from compresso.report.removed import UnitsKept

MOST_ROWS = 12
"""Rows of a table of curves: evenly spaced updates, the last one included."""


def heat_map(cells: Sequence[UnitsKept]) -> Markup:
    """A row for each layer, a column for each part, and in each cell how many units are kept."""
    parts = parts_of(cells)
    layers = dict.fromkeys(cell.layer for cell in cells)
    left = {(cell.layer, cell.part): "all removed" if cell.kept == 0 else f"{cell.kept} of {cell.of}" for cell in cells}
    rows = [[f"layer {layer}", *(left.get((layer, part), "") for part in parts)] for layer in layers]
    return _table(["", *parts], rows, f"Units kept in each of {len(layers)} layers: {', '.join(parts)}.")


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], label: str, *, percent: bool = False, axis: str = "update"
) -> Markup:
    """A column for each line, a row for each of a few updates (or what `axis` says)."""
    found = {name: dict(points) for name, points in lines.items()}
    every = sorted({x for points in found.values() for x in points})
    step = max(1, -(-len(every) // MOST_ROWS))
    shown = every[::-step][::-1]  # counted from the end, so that the last is there
    rows = [
        [f"{x:g}", *(_number(points[x], percent) if x in points else "" for points in found.values())] for x in shown
    ]
    return _table([axis, *found], rows, label)


def trade_off(points: Sequence[Point], x_title: str, y_title: str, label: str, *, percent: bool = False) -> Markup:
    """A row for each model, with what it costs and how good it is, by cost."""
    rows = [
        [
            one.name,
            f"{one.x:,.4g}" if one.x < 1e4 else f"{one.x:,.0f}",
            _number(one.y, percent) + ("" if one.error is None else f" ± {_number(one.error, percent)}"),
        ]
        for one in sorted(points, key=lambda one: one.x)
    ]
    return _table(["model", x_title, y_title], rows, label)


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> Markup:
    """The cells as a table that says in words what it shows; every text is escaped."""
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(drawable(text)) for text in head)
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            drawable(first), Markup("").join(Markup("<td>{}</td>").format(drawable(text)) for text in rest)
        )
        for first, *rest in rows
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(drawable(label), top, body)
