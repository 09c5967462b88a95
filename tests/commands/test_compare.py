"""`compresso compare`: tables, JSON and the page; bad input is one line, exit code 2, and nothing written."""

import json
from pathlib import Path

import pytest
from tests.conftest import Call
from tests.report.made import DENSE, SMALL, dense, number, pruned, records, report_file, report_of, run_folder

from compresso.commands import compare as comparison
from compresso.metrics.record import Report
from compresso.report.table import tables


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


def test_models_stand_side_by_side_within_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers in rows; more models than fit go on in a further table beside the dense one; remarks are said once."""
    monkeypatch.setenv("COLUMNS", "80")
    others = [
        pruned(f"method-{i}", f"sha256:{i:064d}", 11.0 + i, remark="no speed-up: zeros are stored dense")
        for i in range(5)
    ]
    comparison.show(comparison.compare([report_file(tmp_path / "a.json", dense(), *others)]), as_json=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 or "no speed-up" in max(out.splitlines(), key=len)
    heads = [line for line in out.splitlines() if line.startswith("┃") and "dense" in line]
    assert all(f"method-{i}" in "".join(heads) for i in range(5)) and len(heads) % 2 == 0
    assert out.count("no speed-up: zeros are stored dense") == 1


def test_what_all_models_have_comes_first(tmp_path: Path) -> None:
    alone = number("c4/perplexity", 9.0)
    found = comparison.compare([report_file(tmp_path / "a.json", dense(alone), pruned())])
    (table,) = [table for table in tables(found) if table.title == "Perplexity"]
    assert [column.name for column in table.columns] == ["wikitext2/perplexity", "c4/perplexity"]


def test_a_speed_has_one_ratio(tmp_path: Path) -> None:
    found = comparison.compare([report_file(tmp_path / "a.json", dense(), pruned())])
    (table,) = [table for table in tables(found) if table.title == "Speed"]
    said = {column.name: table.rows[-1].cells[i] for i, column in enumerate(table.columns)}
    assert said["decode/batch1"].against == "" and said["decode_speedup/batch1"].text == "0.90 ×"
