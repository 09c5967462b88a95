"""`compresso compare`: tables, JSON and the page; bad input is one line, exit code 2, and nothing written."""

import json
from pathlib import Path

import pytest
from tests.conftest import Call
from tests.report.made import DENSE, SMALL, dense, number, pruned, records, report_file, report_of, run_folder

from compresso.commands import compare as comparison
from compresso.metrics.record import Report


def test_the_verb_prints_tables_and_writes_the_page(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    facts = records(report_of(dense(), pruned(remark="no speed-up: zeros are stored dense")))
    code, out, error = call("compare", run_folder(tmp_path / "small", facts), "--output", tmp_path / "r.html")
    assert (code, error) == (0, "")
    assert out.index("dense") < out.index("small")
    for words in (
        "no speed-up: zeros",
        "70.0 % of dense",
        "within noise",
        "estimated",
        "Not measured: ",
        f"report: {tmp_path / 'r.html'}",
    ):
        assert words in out, words
    assert (tmp_path / "r.html").read_text("utf-8").startswith("<!doctype html>")


def test_json_is_an_account_that_can_be_compared_again(call: Call, tmp_path: Path) -> None:
    run, extra = (
        run_folder(tmp_path / "small"),
        report_file(tmp_path / "dense.json", dense(number("c4/perplexity", 5))),
    )
    code, out, error = call("compare", run, extra, "--json", "--output", tmp_path / "r.html")
    assert (code, error) == (0, "")
    merged = Report.model_validate_json(out)
    assert [one.fingerprint for one in merged.models] == [DENSE, SMALL]
    assert merged.models[0].value("c4/perplexity") == 5
    (tmp_path / "again.json").write_text(out)
    assert comparison.compare([tmp_path / "again.json"]).models == merged.models


def test_without_dense_the_table_says_so(call: Call, tmp_path: Path) -> None:
    _, out, _ = call("compare", report_file(tmp_path / "one.json", pruned()), "--output", tmp_path / "r.html")
    assert "No dense model is among the inputs" in out
    assert "not measured" in out


def test_names_cannot_steer_the_terminal(call: Call, tmp_path: Path) -> None:
    evil = pruned("\x1b[31mred\x07[bold]x[/nonsense]")
    code, out, _ = call("compare", report_file(tmp_path / "one.json", dense(), evil), "--output", tmp_path / "r.html")
    assert code == 0
    assert "\x1b" not in out and "\x07" not in out
    assert "[bold]" in out.replace("\n", "")


def test_bad_input_is_one_line_and_nothing_is_written(call: Call, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    broken = run_folder(tmp_path / "broken")
    (broken / "records.json").write_text('{"format": 3,')
    (tmp_path / "empty").mkdir()
    lone = pruned("stranger", "sha256:99")
    lone = lone.model_copy(update={"measurements": tuple(one for one in lone.measurements if one.how == "counted")})
    stranger = report_file(tmp_path / "stranger.json", lone)
    there = sorted(tmp_path.rglob("*"))
    output = ("--output", tmp_path / "r.html")
    for arguments, says in (
        ((tmp_path / "empty", *output), "CheckpointError: "),
        ((broken, *output), "is not JSON"),
        ((run, stranger, *output), "have no model and no measured number"),
        ((run, tmp_path / "nowhere.json", *output), "does not exist"),
        ((run, "--output", tmp_path), "is a folder"),
        ((run, "--output", stranger), "is not a report"),
        (output, "usage: Missing argument"),
    ):
        code, out, error = call("compare", *arguments)
        assert (code, out) == (2, ""), arguments
        assert says in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there
    assert json.loads((run / "records.json").read_text())["seed"] == 3
