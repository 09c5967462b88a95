"""One schema for writing and reading: what a run wrote comes back as it was, and nothing else is taken for it."""

import json

import pytest

from compresso.errors import CheckpointError
from compresso.report.records import FORMAT, RunRecords
from tests.conftest import Ran
from tests.report.made import records


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["compresso/nano", "magnitude-structured"])
def test_what_a_run_wrote_comes_back_as_it_was(ran: Ran, recipe: str) -> None:
    path = ran(recipe).folder / "records.json"
    stored = json.loads(path.read_text("utf-8"))
    assert stored["format"] == FORMAT
    back = RunRecords.checked(stored, "stored").model_dump(mode="json", exclude_unset=True)
    assert back == stored


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "three"}, "seed: "),
        ({"seconds": float("nan")}, "seconds: "),
        ({"format": 4}, "format: "),
        ({"extra": 1}, "extra: "),
    ],
)
def test_anything_else_is_refused_by_the_name_of_its_field(change: dict[str, object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        RunRecords.checked({**records(), **change}, "the records")


def test_a_missing_field_is_named() -> None:
    lacking = records()
    del lacking["guard"]
    with pytest.raises(CheckpointError, match=r"the records: guard: is missing"):
        RunRecords.checked(lacking, "the records")
