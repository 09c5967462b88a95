"""Tables of trust and refusals at 80 columns: names fold, every number stands whole, long words stand once."""

import pytest

from compresso.commands.evaluate_table import show
from compresso.metrics.record import Change, Environment, Measurement, ModelResults, Report
from compresso.report.read import Input, merged
from compresso.report.table import tables

LONG = "refusal/rate/category/substance-abuse-and-dangerous-practices"
NAMES = ("refusal/rate", LONG, "trust/privacy", "trust/privacy/empty")
WHY = "empty or looping answers went from 0% to 100%"


def _results(name: str, value: float, changes: tuple[Change, ...] = ()) -> ModelResults:
    numbers = tuple(
        Measurement(
            name=one,
            value=value,
            unit="share",
            how="measured",
            low=0.123,
            high=0.789,
            n=2475,
            protocol={"suite": "refusal", "interval": "95 %"},
            environment=Environment.here(),
        )
        for one in NAMES
    )
    fingerprint = "sha256:" + name[0] * 64
    return ModelResults(name=name, model=name, fingerprint=fingerprint, measurements=numbers, changes=changes)


def _report() -> Report:
    changes = tuple(
        Change(
            name=one, dense=0.456, smaller=1, difference=0.544, low=-0.512, high=0.987, n=2475, p=1.2e-15,
            verdict="not comparable", words=WHY,
        )
        for one in NAMES[:3]
    )  # fmt: skip
    models = (_results("dense", 0.456), _results("zero", 1, changes))
    return Report(created="2026-01-01T00:00:00+00:00", models=models)


def test_no_number_is_cut_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(_report())
    out = capsys.readouterr().out
    assert "\u2026" not in out and max(map(len, out.splitlines())) <= 80
    assert out.count("0.456") == 4 and out.count("0.123 to 0.789") == 8
    for one in ("-51.2..+98.7", "+54.4", "1.2e-15", "2,475", "not comparable"):
        assert out.count(one) >= 3, one
    assert " ".join(out.split()).count(WHY) == 1 and "all rows: not comparable" in " ".join(out.split())


def test_a_comparison_says_of_a_broken_model_no_gain() -> None:
    (table,) = tables(merged([Input("one", _report())]))
    (broken,) = [row for row in table.rows if row.kind == "pruned"]
    assert {cell.against for cell in broken.cells} == {"not comparable"}, "and of what belongs to a score"
    assert all(cell.within_noise is None and WHY in cell.remark for cell in broken.cells)
