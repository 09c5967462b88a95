"""Without the extra `report` the page holds tables of the same numbers, and says so."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compresso.report import charts
from compresso.report.chart_tables import MOST_ROWS
from compresso.report.html import page
from compresso.report.marks import Point
from compresso.report.read import read_results
from compresso.report.removed import CHANNELS, HEADS, UnitsKept
from tests.report.made import dense, pruned, report_file, run_folder
from tests.report.test_html import EVIL, safe


@pytest.fixture(params=charts.DRAWN_BY)
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One of the two packages cannot be imported."""
    monkeypatch.setitem(sys.modules, request.param, None)


def cells(drawn: str) -> list[list[str]]:
    """The texts of a table, row by row."""
    root = ElementTree.fromstring(drawn)
    assert root.get("role") == "region" and root.get("aria-label") and root.get("tabindex") == "0"
    return [[cell.text or "" for cell in row] for row in root.iter("tr")]


@pytest.mark.usefixtures("without")
def test_every_chart_has_a_table_of_its_numbers() -> None:
    left = [UnitsKept(0, HEADS, 1, 4), UnitsKept(0, CHANNELS, 0, 64), UnitsKept(1, HEADS, 4, 4)]
    assert cells(charts.heat_map(left)) == [
        ["", HEADS, CHANNELS],
        ["layer 0", "1 of 4", "all removed"],
        ["layer 1", "4 of 4", ""],
    ]
    points = [Point("b", 0, 2.5e6, 0.5, 0.01), Point("a", 1, 12.0, 0.25)]
    assert cells(charts.trade_off(points, "size", "accuracy", "l", x_lower=True, y_lower=False, percent=True)) == [
        ["model", "size", "accuracy"],
        ["a", "12", "25.0 %"],
        ["b", "2,500,000", "50.0 % ± 1.0 %"],
    ]
    lines = {"loss": [(i, 1.0 + i) for i in range(100)], EVIL: [(99, 0.5)]}
    head, *rows = cells(charts.curves(lines, EVIL))
    assert head[:2] == ["update", "loss"] and head[2].startswith("</style>")
    assert len(rows) <= MOST_ROWS and rows[-1] == ["99", "100", "0.5"]


@pytest.mark.usefixtures("without")
def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    seen = safe(
        page(read_results([run_folder(tmp_path / "small"), report_file(tmp_path / "more.json", dense(), pruned())]))
    )
    assert "Tables stand in the place of charts" in seen.words and 'pip install "compresso-llm[report]"' in seen.words
    assert "layer 0" in seen.words
    assert "svg" not in {tag for tag, _ in seen.tags}


def test_the_page_draws_where_it_can(tmp_path: Path) -> None:
    seen = safe(page(read_results([run_folder(tmp_path / "small")])))
    assert "Tables stand in the place" not in seen.words
    assert "svg" in {tag for tag, _ in seen.tags}
