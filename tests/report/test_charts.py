"""The charts are plain SVG in the page's colours, and the frontier is one."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.report import charts
from compresso.report.marks import Point, undominated
from compresso.report.removed import CHANNELS, HEADS, UnitsKept

EVIL = """<script>alert(1)</script>"' onload="x" ${1} {{7*7}} datum.name"""
COORDINATES = st.tuples(st.integers(0, 4), st.integers(0, 4))


def checked(svg: str) -> ElementTree.Element:
    """The drawing as XML, after checks that hold for all of them."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not [
        name for element in root.iter() for name in element.attrib if name.lower().startswith("on") or "href" in name
    ]
    assert "var(--muted)" in svg
    colours = {element.get(kind) for element in root.iter() for kind in ("fill", "stroke")} - {
        None,
        "none",
        "transparent",
    }
    assert all(colour.startswith("var(--") for colour in colours if colour), colours
    assert float(root.get("width") or 0) <= 343  # a phone of 375 px less its margins
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def test_the_heat_map_says_every_number() -> None:
    cells = [UnitsKept(layer, part, layer, 3) for layer in range(4) for part in (HEADS, CHANNELS)]
    said = texts(checked(charts.heat_map(cells)))
    assert said.count("2 of 3") == 2 and said.count("all removed") == 2
    assert {"layer 0", "layer 3", HEADS, CHANNELS} <= set(said)


def test_fuller_cells_are_fuller_of_colour() -> None:
    svg = charts.heat_map([UnitsKept(0, HEADS, 1, 4), UnitsKept(1, HEADS, 2, 4), UnitsKept(2, HEADS, 4, 4)])
    shades = [float(text) for text in re.findall(r'fill="var\(--accent\)" opacity="([\d.]+)"', svg)]
    assert shades == sorted(shades) and len(set(shades)) == 3


def test_curves_keep_their_names_and_dashes() -> None:
    lines = {"expected": [(0.0, 0.0), (1.0, 0.2)], "target": [(0.0, 0.1), (1.0, 0.3)], EVIL: [(1.0, 0.25)]}
    root = checked(charts.curves(lines, EVIL, percent=True, dashed=("target",)))
    assert {"expected", "target"} <= set(texts(root))
    assert any(text.startswith("<script>") for text in texts(root))
    assert any(element.get("stroke-dasharray") == "4,3" for element in root.iter())


def test_a_trade_off_marks_every_model_with_its_name() -> None:
    points = [Point("dense", 0, 10, 5.0, 0.5), Point(EVIL, 1, 7, 6.0), Point("other", 2, 7, 9.0)]
    root = checked(charts.trade_off(points, "x", "y", "label", x_lower=True, y_lower=True))
    assert {"dense", "other"} <= set(texts(root))


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x00", "\ud800", "\ufffe", "\u202e", "\x85", "\n"])
def test_no_name_ends_the_process(odd: str) -> None:
    points = [Point("dense", 0, 10, 5.0), Point(f"a{odd}b", 1, 7, 6.0)]
    checked(charts.trade_off(points, "x", "y", odd, x_lower=True, y_lower=True))
    checked(charts.curves({"loss": [(0, 1), (1, 2)], f"a{odd}b": [(0, 2), (1, 3)]}, odd))


def test_a_model_keeps_its_mark_where_others_are_absent() -> None:
    def colours(*points: Point) -> set[str]:
        return set(
            re.findall(r"var\(--(?:ink|s\d)\)", charts.trade_off(points, "x", "y", "l", x_lower=True, y_lower=True))
        )

    a, b, c = (Point(name, i, i + 1.0, 1.0 + i) for i, name in enumerate("abc"))
    assert colours(a, c) < colours(a, b, c)


@given(st.lists(COORDINATES, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_the_frontier_is_what_no_other_beats(places: list[tuple[int, int]], x_lower: bool, y_lower: bool) -> None:
    points = [Point(str(i), i, x, y) for i, (x, y) in enumerate(places)]
    front = undominated(points, x_lower=x_lower, y_lower=y_lower)

    def at_least(one: Point, other: Point) -> bool:
        return (one.x <= other.x if x_lower else one.x >= other.x) and (
            one.y <= other.y if y_lower else one.y >= other.y
        )

    assert front
    for point in points:
        better = any(at_least(other, point) and (other.x, other.y) != (point.x, point.y) for other in points)
        assert (point in front) != better
    assert [point.x for point in front] == sorted(point.x for point in front)


def test_a_name_has_one_colour_in_all_charts_of_an_order() -> None:
    line = [(0.0, 1.0), (1.0, 2.0)]
    order = ("dense", "gates", "window")
    whole = str(charts.curves(dict.fromkeys(order, line), "all", order=order))
    part = str(charts.curves({"window": line, "gates": line, "more": line}, "some", order=order))
    assert all(f"var(--s{i})" in whole for i in range(3))
    assert "var(--s0)" not in part  # dense's
    assert all(f"var(--s{i})" in part for i in (1, 2, 3))
