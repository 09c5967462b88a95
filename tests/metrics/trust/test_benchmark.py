"""`benchmarks/trust.py` on scripted models: what its lines hold is what its table, figure and catalogue say."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compresso.metrics.trust.asking import Limits, Request
from compresso.metrics.trust.suite import Extent, trust_changes, trust_of
from compresso.stage import card
from tests.metrics.trust.made_up import data
from tests.metrics.trust.scripted import Scripted
from tests.metrics.trust.test_dimensions import oracle

SOUND = {"nats": (30.0, 31.0), "tokens": (10, 10), "examples_sha256": "x"}
BROKEN = {"nats": (90.0, 90.0), "tokens": (10, 10), "examples_sha256": "x"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts, from their folder: `bench.trust` and `bench.trust_report`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import trust
    import trust_report

    yield type("Scripts", (), {"trust": trust, "trust_report": trust_report})
    for name in ("trust", "trust_report", "repair", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of a dense model and three smaller ones: the same, one that is unfair, one that is broken."""

    def unfair(request: Request) -> str:
        return "yes" if "<a>" in request.text else oracle(request)

    def line(method: str, says: Callable[[Request], str], **more: Any) -> dict[str, Any]:
        found = trust_of(Scripted(says), data(tmp_path), Extent(written=8))
        made = {"model": "m", "method": method, "seed": 0, "system": "plain", "limit": 40, "written": 8}
        made |= {"dimensions": [], "examples": 8, "length": 64, "group": None, "stage": method.split("-")[0]}
        made |= {"blocks": 2**20, "plain": SOUND, "wikitext2": SOUND, "machine": {"processor": "a processor"}}
        return json.loads(json.dumps({**made, "outcomes": [asdict(one) for one in found], **more}))

    return [
        line("dense", oracle),
        line("rtn-4", oracle, bits=4.25),
        line("wanda-50", unfair, zeros=0.5),
        line("wanda-2:4", lambda _: "yes", zeros=0.5, plain=BROKEN),
    ]


def test_a_line_is_read_back_as_it_was_found(bench: Any, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    found = trust_of(Scripted(oracle), data(tmp_path), Extent(written=8))
    assert bench.trust_report.outcomes(lines[0]) == found
    asked = {"deed", "person", "statement", "claim", "example.org"}
    assert not any(text in json.dumps(lines[0]) for text in asked), "questions go by number"


def test_verdicts_are_those_of_the_suite(bench: Any, lines: list[dict[str, Any]]) -> None:
    told = bench.trust_report
    dense, same, unfair, broken = lines
    assert {one.verdict for one in told.changes(dense, same)} == {"within noise", "not measured"}
    fell = [one.name for one in told.changes(dense, unfair) if one.verdict == "fell"]
    assert fell == ["trust/fairness"]
    assert told.changes(dense, unfair) == trust_changes(told.outcomes(dense), told.outcomes(unfair))
    assert {one.verdict for one in told.changes(dense, broken)} == {"not comparable", "not measured"}


def test_what_is_left_of_a_weight(bench: Any) -> None:
    left = bench.trust_report.bits
    assert left({}) == 16 and left({"bits": 4.25}) == 4.25 and left({"zeros": 0.25}) == 12 and left({"kept": 0.5}) == 8
    assert left({"bits": 4, "zeros": 0.5}) == 2
    assert bench.trust_report.mib({"blocks": 2**20, "bits": 4}) == 0.5


def test_table_figure_and_catalogue(
    bench: Any, lines: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = bench.trust_report
    (tmp_path / "commands").mkdir()
    monkeypatch.setattr(told, "RESULTS", tmp_path)
    monkeypatch.setattr(told, "rows", lambda: lines)
    monkeypatch.setattr(told.compresso, "__file__", str(tmp_path / "__init__.py"))
    told.report()
    text = (tmp_path / "trust.md").read_text()
    (unfair,) = [line for line in text.splitlines() if line.startswith("| wanda-50 |")]
    assert unfair.count("FELL") == 1 and "50.0, \u221250.0" in unfair and "| 8 |" in unfair
    (broken,) = [line for line in text.splitlines() if line.startswith("| wanda-2:4 |")]
    assert broken.count("not compared") == 7 and "rose" not in broken and "FELL" not in broken
    assert "Not compared: wanda-2:4, 0: its perplexity" in text
    rows = json.loads((tmp_path / "commands" / "measured_trust.json").read_text())["rows"]
    assert [row["stages"] for row in rows] == [["rtn"], ["wanda"], ["wanda"]]
    assert "fell: fairness, rose: none" in rows[1]["found"] and rows[2]["found"].endswith("broken, not compared")
    drawn = told.points(lines)
    assert len(drawn) == 4 * 7 and {one["mib"] for one in drawn if one["method"] == "rtn"} == {0.53}
    assert all(len(places) == 4 for places in _places(drawn).values()), "none hides another"
    assert {one["chance"] for one in drawn if one["dimension"] == "ethics"} == {50.0}
    assert {one["sound"] for one in drawn if one["mib"] == 1 and one["score"] == 0} == {told.BROKEN}
    assert "<svg" in (tmp_path / "trust.svg").read_text()


def _places(drawn: list[dict[str, Any]]) -> dict[str, set[float]]:
    """Of each panel where its marks stand."""
    found: dict[str, set[float]] = {}
    for one in drawn:
        found.setdefault(one["dimension"], set()).add(one["place"])
    return found


def test_every_method_is_a_stage_with_knobs_it_has(bench: Any) -> None:
    trust = bench.trust
    for method, (stage, knobs) in trust.METHODS.items():
        assert (stage == "") == (method == "dense")
        if stage in trust.CALIBRATED:
            knobs = {**knobs, "calibration": {"examples": 4, "batch": 1}}
        if stage in trust.GROUPED:
            knobs = {**knobs, "group": 64}
        if stage:
            card(stage).type(**knobs)


def test_a_system_text_stands_before_that_of_a_request(bench: Any) -> None:
    heard: list[str] = []

    class Listening(Scripted):
        def write(self, requests, limits):  # type: ignore[no-untyped-def]
            heard.extend(one.system for one in requests)
            return super().write(requests, limits)

    asked = [Request("a", "?"), Request("b", "?", system="own")]
    for system in ("", "ours"):
        bench.trust.Prompted(Listening(lambda _: "yes"), system).write(asked, Limits(4))
    assert heard == ["", "own", "ours", "ours\nown"]
