"""No remark stands alone: on the page and in the terminal each names the numbers, and the models, that it is about."""

import re
from pathlib import Path

import pytest

from compresso.commands import compare
from compresso.metrics.record import Measurement, ModelResults
from compresso.report.html import page, report_of_run
from compresso.report.read import read_results
from compresso.report.remarks import remarks_of
from tests.report.made import PLAN, checked, dense, number, pruned, records, report_file, report_of

UNASKED = "no question of challenging was answered, so that the score is of the other parts"
SCORED = "scored by a small scorer"
SPEED = "no speed-up: zeros are stored dense"
SAID = (
    f"toxicity: {SCORED}",
    f"out of distribution; privacy: {UNASKED}",
    f"decode speed-up, batch 1: {SPEED}",
)


def trust(name: str, remark: str) -> Measurement:
    return number(f"trust/{name}", 0.5, "share", protocol={"suite": "trust"}, remark=remark, n=9)


def remarked(name: str = "compresso", fingerprint: str = pruned().fingerprint) -> ModelResults:
    found = pruned(name, fingerprint, remark=SPEED)
    told = (trust("toxicity", SCORED), trust("out_of_distribution", UNASKED), trust("privacy", UNASKED))
    return found.model_copy(update={"measurements": (*told, *found.measurements)})


def test_a_summary_names_what_its_remarks_are_about() -> None:
    assert remarks_of(remarked().measurements) == [*SAID]
    shown = report_of_run(checked(records(report_of(dense(), remarked()))), PLAN)
    summary = shown.partition('<section id="summary">')[2].partition("</section>")[0]
    assert re.findall(r'<p class="remark">(.*?)</p>', summary) == [*SAID]


def test_below_tables_models_are_named_with_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_results(
        [report_file(tmp_path / "a.json", dense(), remarked("a"), remarked("b", "sha256:" + "9" * 64))]
    )
    told = [
        f"a, b (toxicity): {SCORED}",
        f"a, b (out of distribution; privacy): {UNASKED}",
        f"a, b (decode speed-up, batch 1): {SPEED}",
    ]
    assert re.findall(r'<li class="remark">(.*?)</li>', page(found)) == told
    compare.show(found, as_json=False)
    out = capsys.readouterr().out
    assert all(line in out.splitlines() for line in told)
