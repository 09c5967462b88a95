"""The demo end to end, on the embedded model, with training and measuring cut to almost nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Call

import compresso
from compresso.commands import demo, verify
from compresso.engines.parity import Parity
from compresso.metrics.latency import speed_measurements
from compresso.metrics.record import ModelResults, Report
from compresso.runner.recipe import override, read, with_knob

ROWS = ["dense", "magnitude", "gate-taylor", "compresso"]


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(recipe: str) -> dict[str, object]:
        raw = with_knob(with_knob(read(recipe), "max_steps", 1), "batch", 4)
        raw = with_knob(with_knob(raw, "micro_batch", 4, required=False), "rank", 1, required=False)
        raw = with_knob(with_knob(raw, "batches", 1, required=False), "score_batches", 1, required=False)
        return override(override(raw, "data.limit", 24), "data.held", 4)

    monkeypatch.setattr(demo, "read", short)
    monkeypatch.setattr(demo, "ITEMS_PER_TASK", 1)
    monkeypatch.setattr(demo, "DOCUMENTS", 2)

    def briefly(models: dict[str, Any], **_: Any) -> dict[str, Any]:
        return speed_measurements(models, batches=(1,), prompt_tokens=2, new_tokens=2, rounds=1)

    monkeypatch.setattr(demo, "speed_measurements", briefly)
    answers = [Parity("transformers", "yes", same_tokens=8), Parity("vLLM", "not installed", "vllm is not installed")]
    monkeypatch.setattr(verify, "verify", lambda folder: answers if folder.name == "compresso" else [])


@pytest.mark.slow
@pytest.mark.usefixtures("shortened", "quick_reopening")
def test_the_demo_writes_its_account_and_report_and_says_how_to_load(call: Call, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    code, out, error = call(
        "demo", "--output", output, "--keep", 0.7, "--allow-collapsed"
    )  # one update: the guard may refuse the result
    assert code == 0, error
    report = Report.model_validate(json.loads((output / "report.json").read_text(), parse_constant=pytest.fail))
    assert [results.name for results in report.models] == ROWS
    dense, *pruned = report.models
    found = {one.name for one in dense.measurements}
    sizes, blocks = value(dense, "parameters/total"), set()
    for results in pruned:
        assert value(results, "parameters/total") < sizes
        assert value(results, "bytes/disk") < value(dense, "bytes/disk")
        assert value(results, "decode_bound/batch1") > 1
        mine = {one.name for one in results.measurements}
        assert mine - found == {"prefill_speedup/batch1", "decode_speedup/batch1", "decode_bound/batch1"}
        assert value(results, "world/perplexity") > 1
        assert 0 <= value(results, "world/acc") <= 1
        blocks.add(value(results, "parameters/blocks") // 10_000)
    assert len(blocks) == 1
    flat = " ".join(out.split())
    assert all(name in flat for name in ROWS)
    assert f'compresso.load("{output / "compresso"}")' in out.replace("\n", "")
    assert "transformers yes 8 of 8 greedy tokens the same" in flat and flat.endswith(
        "vLLM not installed vllm is not installed"
    )
    assert sorted(path.name for path in output.iterdir()) == [
        "compresso",
        "gate-taylor",
        "magnitude",
        "report.html",
        "report.json",
    ]
    report = (output / "report.html").read_text("utf-8")
    assert all(name in report for name in ROWS)
    loaded = compresso.load(output / "compresso")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == value(pruned[-1], "parameters/total")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def value(results: ModelResults, name: str) -> float:
    found = results.value(name)
    assert found is not None
    return found


def test_the_demo_refuses_before_it_trains(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["compresso.runner.first_job"], "load_model", pytest.fail)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in call("demo", "--output", tmp_path / "full")[2]
    code, _, error = call("demo", "--output", tmp_path / "new", "--keep", 1.5)
    assert code == 2
    assert "--keep 1.5: the kept share of block parameters lies in (0, 1]" in error
    assert not (tmp_path / "new").exists()
