"""Charts as inline SVG, drawn by altair without JavaScript. Colours are CSS variables of the page, so one drawing
serves light and dark.

Each is one of several small ones, about as wide as a phone; the page lays them out. Only fixed field names reach
altair, and all texts from outside are data, so a model's name cannot become markup or an expression. Characters that
XML forbids are replaced first: the renderer would end the process at one.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import altair as alt
from markupsafe import Markup

from compresso.report.marks import Point, drawable, parts_of, undominated
from compresso.report.removed import UnitsKept

WIDTH, HEIGHT = 330, 210
"""Of a whole chart with its axes, px: it just fits a phone."""
SERIES = tuple(f"var(--s{i})" for i in range(8))
_TICKS = 4
"""Of an axis of values, about."""
_MARKS = ("var(--ink)", *SERIES)
"""The first is the dense model's. One colour more than shapes, so that the pairs repeat late."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")


def heat_map(cells: Sequence[UnitsKept]) -> Markup:
    """Layers downwards, parts across; the fuller the colour, the more is kept, and each cell says how many units."""
    parts = parts_of(cells)
    values = [
        {
            "layer": c.layer,
            "part": c.part,
            "share": c.share,
            "text": "all removed" if c.kept == 0 else f"{c.kept} of {c.of}",
            "removed": c.kept == 0,
        }
        for c in cells
    ]
    n_layers = len({cell.layer for cell in cells})
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "part:N",
            sort=parts,
            title=None,
            scale=alt.Scale(paddingInner=0.03),
            axis=alt.Axis(orient="top", labelAngle=0, ticks=False, domain=False, labelLimit=120),
        ),
        y=alt.Y(
            "layer:O",
            title=None,
            scale=alt.Scale(paddingInner=0.12),
            axis=alt.Axis(ticks=False, domain=False, labelExpr="'layer ' + datum.value"),
        ),
    )
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.03, 0.5]), legend=None)
    full = base.mark_rect(color="var(--accent)").encode(opacity=opacity)
    removed = base.transform_filter("datum.removed").mark_rect(
        filled=False, stroke="var(--warn)", strokeWidth=1, strokeDash=[3, 2]
    )
    words = base.mark_text(color="var(--ink)", fontSize=10).encode(text="text:N")
    chart = alt.layer(full, removed, words).properties(width=WIDTH, height={"step": 24 if n_layers <= 16 else 17})
    return _svg(chart, f"Units kept in each of {n_layers} layers: {', '.join(parts)}.", fit="fit-x")


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    *,
    percent: bool = False,
    dashed: Sequence[str] = (),
    axis: str = "update",
    order: Sequence[str] = (),
) -> Markup:
    """Lines over updates (or what `axis` says), one for each name; those in `dashed` are drawn so.

    order: names that several drawings have in common, so that each has its colour in all of them.
    """
    lines = {drawable(name): points for name, points in lines.items()}
    names = list(lines)
    known = [drawable(name) for name in order]
    values = [{"update": x, "value": y, "line": name} for name, points in lines.items() for x, y in points]
    legend = (
        None
        if len(names) == 1
        else alt.Legend(title=None, orient="top", symbolType="stroke", columns=2, columnPadding=14, labelLimit=130)
    )
    solid = [*known, *(name for name in names if name not in dashed and name not in known)]
    colours = ["var(--muted)" if name in dashed else SERIES[solid.index(name) % len(SERIES)] for name in names]
    single = [name for name, points in lines.items() if len(points) == 1]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.75, interpolate="linear")
        .encode(
            x=alt.X(
                "update:Q",
                title=axis,
                axis=alt.Axis(
                    tickCount=5, tickMinStep=1, format="d", grid=False, labelOverlap="greedy", labelSeparation=8
                ),
            ),
            y=alt.Y(
                "value:Q",
                title=None,
                scale=alt.Scale(zero=False, nice=True),
                axis=_value_axis("%" if percent else None),
            ),
            color=alt.Color("line:N", sort=names, scale=alt.Scale(domain=names, range=colours), legend=legend),
            strokeDash=alt.StrokeDash(
                "line:N",
                scale=alt.Scale(domain=names, range=[[4, 3] if name in dashed else [1, 0] for name in names]),
                legend=None,
            ),
        )
    )
    dots = chart.transform_filter(alt.FieldOneOfPredicate("line", single)).mark_point(filled=True, size=60)
    both = alt.layer(chart, dots) if single else chart
    return _svg(both.properties(width=WIDTH, height=HEIGHT), label)


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
    """Quality against cost: a mark for each model, bars of one standard error, and a line through those that no other
    beats in both.
    """
    points = [replace(point, name=drawable(point.name)) for point in points]
    names, marked = [point.name for point in points], [point.mark for point in points]
    values = [
        {"name": p.name, "x": p.x, "y": p.y, "low": p.y - (p.error or 0), "high": p.y + (p.error or 0)} for p in points
    ]
    ends = [end for p in points for end in (p.y - (p.error or 0), p.y + (p.error or 0))]
    front = [{"x": p.x, "y": p.y} for p in undominated(points, x_lower=x_lower, y_lower=y_lower)]
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=alt.Scale(zero=False, nice=True, padding=12),
        axis=alt.Axis(tickCount=4, format="~s", grid=True),
    )
    y = alt.Y(
        "y:Q",
        title=y_title,
        scale=alt.Scale(zero=False, nice=True, padding=12),
        axis=_value_axis(percent_format(ends) if percent else None),
    )
    legend = alt.Legend(title=None, orient="bottom", columns=2, columnPadding=14, labelLimit=105, symbolSize=70)
    base = alt.Chart(alt.Data(values=values))
    line = (
        alt.Chart(alt.Data(values=front))
        .mark_line(color="var(--muted)", strokeWidth=1, strokeDash=[2, 3])
        .encode(x=x, y=y)
    )
    bars = base.mark_rule(color="var(--muted)").encode(x=x, y=alt.Y("low:Q", title=y_title), y2="high:Q")
    marks = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=x,
        y=y,
        color=alt.Color(
            "name:N",
            sort=names,
            scale=alt.Scale(domain=names, range=[_MARKS[i % len(_MARKS)] for i in marked]),
            legend=legend,
        ),
        shape=alt.Shape(
            "name:N",
            sort=names,
            scale=alt.Scale(domain=names, range=[SHAPES[i % len(SHAPES)] for i in marked]),
            legend=legend,
        ),
    )
    return _svg(alt.layer(line, bars, marks).properties(width=WIDTH, height=HEIGHT + 50), label)


def percent_format(values: Sequence[float]) -> str:
    """Digits enough to tell the ticks of an axis over some shares from each other.

    >>> percent_format([0.2, 0.9]), percent_format([0.6487, 0.6506]), percent_format([0.5])
    ('.0%', '.2%', '.0%')
    """
    step = (max(values) - min(values)) / _TICKS
    return f".{min(4, max(0, math.ceil(-math.log10(100 * step)))) if step > 0 else 0}%"


def _value_axis(format: str | None) -> alt.Axis:
    axis = alt.Axis(tickCount=_TICKS, domain=False, ticks=False)
    return axis if format is None else alt.Axis(tickCount=_TICKS, domain=False, ticks=False, format=format)


def _svg(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, label: str, fit: Literal["fit", "fit-x"] = "fit"
) -> Markup:
    """The chart as an `<svg>` element that says in words what it shows."""
    configured = (
        chart.configure(
            background="transparent",
            aria=False,
            padding={"left": 8, "right": 6, "top": 8, "bottom": 2},
            autosize=alt.AutoSizeParams(type=fit, contains="padding"),
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="var(--muted)",
            titleColor="var(--muted)",
            gridColor="var(--line)",
            domainColor="var(--line)",
            tickColor="var(--line)",
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            labelPadding=4,
        )
        .configure_legend(labelColor="var(--ink)", labelFontSize=11, symbolStrokeWidth=2)
    )
    drawn = io.StringIO()
    configured.save(drawn, format="svg")
    return Markup('<svg role="img" aria-label="{}" ').format(drawable(label)) + Markup(
        drawn.getvalue().removeprefix("<svg ")
    )
