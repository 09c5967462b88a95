"""`benchmarks/refusals.py`: what its lines hold is what its table and the catalogue say, and no text is in them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compresso.stage import card
from tests.metrics.trust.scripted import TEMPLATES

SOUND = {"nats": (30.0, 31.0), "tokens": (10, 10), "examples_sha256": "x"}
BROKEN = {"nats": (90.0, 90.0), "tokens": (10, 10), "examples_sha256": "x"}
IDS = [f"{template}/{c}/0/{s}/0" for template in TEMPLATES for c in range(5) for s in range(3)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts, from their folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import refusals
    import refusals_report

    yield type("Scripts", (), {"refusals": refusals, "report": refusals_report})
    for name in ("refusals", "refusals_report", "trust", "trust_report", "repair", "common"):
        sys.modules.pop(name, None)


def line(method: str, refused: int, benign: int = 20, **more: Any) -> dict[str, Any]:
    """A model that refuses the first ones of 165 harmful prompts, and answers so many of 20 benign ones."""
    answers = {id: "refusal" if place < refused else "answered" for place, id in enumerate(IDS)}
    answers |= {f"benign/T0/{i}": "answered" if i < benign else "refusal" for i in range(20)}
    made = {"model": "m", "method": method, "seed": 0, "limit": 10, "benign": 5, "new_tokens": 24, "examples": 8}
    made |= {"length": 64, "prompts_sha256": "x", "blocks": 100, "zeros": 0.05, "published": IDS[:3]}
    made |= {"plain": SOUND, "wikitext2": SOUND, "machine": {"processor": "a processor"}}
    return json.loads(json.dumps({**made, "answers": answers, **more}))


def test_table_and_catalogue(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line("dense", 33, zeros=0),
        line("wanda-attention-20", 66, benign=10),
        line("wanda-all-20", 165, plain=BROKEN),
        line("wanda-mlp-20", 33, new_tokens=99),
    ]
    (tmp_path / "commands").mkdir()
    told = bench.report
    monkeypatch.setattr(told, "RESULTS", tmp_path)
    monkeypatch.setattr(told, "rows", lambda: lines)
    monkeypatch.setattr(told.compresso, "__file__", str(tmp_path / "__init__.py"))
    told.report()
    text = (tmp_path / "refusals.md").read_text()
    table = [one for one in text.splitlines() if one.startswith("| ")]
    cells = {one.split(" | ")[0].strip("| "): one.strip("| ").split(" | ") for one in table}
    head, attention, whole = cells["pruned"], cells["attention-20"], cells["all-20"]
    assert len(head) == len(attention) == len(whole)
    assert cells["dense"][head.index("refused")].startswith("20.0 (")
    assert attention[head.index("refused")].startswith("40.0 (")
    assert attention[head.index("difference")].startswith("+20.0 (+")
    assert float(attention[head.index("p")]) == pytest.approx(2 / 2**33, rel=0.1), "33 of 33 alike"
    assert attention[head.index("by the published strings")] == "1.8"
    assert attention[-1] == "refusals rose; benign answers fell"
    assert whole[-1].startswith("not comparable: its perplexity"), "all refused by a broken model"
    assert "mlp-20" not in text, "answers of another length are not compared"
    assert cells["AIM" if "AIM" in cells else "T0"][1:] == ["15", "15", "15", "15"]
    rows = json.loads((tmp_path / "commands" / "measured_refusals.json").read_text())["rows"]
    assert [row["what"].split(" where ")[1] for row in rows] == [
        "20 % of attention's weights become zero",
        "20 % of all weights of the blocks become zero",
    ]
    assert "refused: 33 of 165 before, 66 of 165 after; benign ones answered: 20 of 20 before, 10" in rows[0]["found"]


def test_every_method_prunes_with_knobs_that_its_stage_has(bench: Any) -> None:
    methods = bench.refusals.compressed.__globals__["METHODS"]
    for name in bench.report.METHODS[1:]:
        stage, knobs = methods[name]
        card(stage).type(**knobs, calibration={"examples": 4, "batch": 1})


def test_what_is_committed_holds_no_text() -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "results" / "refusals.jsonl"
    kinds = {"refusal", "answered", "degenerate", "empty", "no room"}
    for row in map(json.loads, path.read_text().splitlines()):
        assert set(row["answers"].values()) <= kinds
        assert all(len(id) < 32 and " " not in id for id in (*row["answers"], *row["published"]))
