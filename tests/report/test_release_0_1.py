"""What release 0.1 wrote is read as it was: records.json with plan.json, and the file of `evaluate --output`."""

import json
from pathlib import Path
from typing import Any

import pytest

from compresso.errors import CheckpointError
from compresso.metrics.record import Report
from compresso.report.read import read_results
from compresso.report.records import RunRecords

OLD = Path(__file__).parent / "release_0_1"


def stored(name: str) -> dict[str, Any]:
    return json.loads((OLD / name).read_text("utf-8"))


def test_records_differ_in_two_names_only() -> None:
    old = stored("records.json")
    assert (old["format"], old["account"]["format"]) == (2, 1)
    back = RunRecords.checked(old, "records.json").model_dump(mode="json", exclude_unset=True)
    assert (back.pop("format"), back["report"].pop("format")) == (3, 2)
    report, account = back.pop("report"), old.pop("account")
    assert report.pop("models") == account.pop("subjects")
    del old["format"], account["format"]
    assert (back, report) == (old, account)


def test_the_file_of_evaluate_and_the_run_are_compared_as_before() -> None:
    old = stored("evaluate.json")
    report = Report.model_validate(old)
    assert report.model_dump(mode="json", exclude_unset=True)["models"] == old["subjects"]
    comparison = read_results([OLD, OLD / "evaluate.json"])
    dense, pruned = comparison.models
    assert dense.fingerprint == report.models[0].fingerprint
    assert dense.value("world_fact/acc") == old["subjects"][0]["measurements"][0]["value"]
    (run,) = comparison.runs
    assert run.result == pruned.fingerprint
    assert len(run.plan.kept["layers.0.channels"]) > 0


@pytest.mark.parametrize(
    "change", [{"format": 3}, {"report": {}}, {"surprise": 1}], ids=["new format, old key", "both keys", "unknown key"]
)
def test_an_old_file_is_checked_as_strictly_as_a_new_one(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"^old: "):
        RunRecords.checked(stored("records.json") | change, "old")
