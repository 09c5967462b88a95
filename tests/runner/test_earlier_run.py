"""What an earlier run did to the weights, and a later one loses, is said before it begins."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import compresso
from compresso.errors import CheckpointError

SAID = "changes weights that rtn rounded when model was made"


@pytest.fixture
def rounded(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model beside records of a run that rounded it last."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    stages = {"gate_taylor": {"bits": None}, "rtn": {"bits": 4.5}, "skip_in_prefill": {}}
    (folder / "records.json").write_text(json.dumps({"stages": stages}))
    return folder


@pytest.mark.parametrize(
    ("stages", "lost"),
    [
        ([{"magnitude_structured": {"keep": 0.8}}], True),
        ([{"magnitude_structured": {"keep": 0.8}}, {"rtn": {"bits": 8}}], True),
        ([{"rtn": {"bits": 8}}], False),
        ([{"skip_in_prefill": {"skip": 0.3}}], False),
    ],
)
def test_a_rounding_of_an_earlier_run_that_is_lost_is_said_once(
    stages: list[dict[str, Any]], lost: bool, rounded: Path, tiny_folder: Path
) -> None:
    notes = compresso.plan({"name": "mine", "stages": stages}, rounded)["notes"]
    assert sum(SAID in note for note in notes) == lost
    assert not any("rounded when" in note for note in compresso.plan({"stages": stages}, tiny_folder)["notes"])


@pytest.mark.usefixtures("quick_reopening")
def test_a_run_says_it_too(rounded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = {"name": "mine", "stages": [{"magnitude_structured": {"keep": 0.8}}]}
    compresso.run(raw, rounded, output=tmp_path / "out", measure="none", allow_collapsed=True)
    assert caplog.text.count(SAID) == 1 and "give the model from before rtn" in caplog.text


@pytest.mark.parametrize("records", ["{", "[]", '{"stages": 3}', '{"stages": {"rtn": 4}}', "{}"])
def test_records_of_others_say_nothing_and_stop_nothing(records: str, rounded: Path) -> None:
    (rounded / "records.json").write_text(records)
    raw = {"name": "mine", "stages": [{"magnitude_structured": {"keep": 0.8}}]}
    assert not any("rounded when" in note for note in compresso.plan(raw, rounded)["notes"])


@pytest.mark.parametrize("records", ['{"patches": 3}', '{"patches": [3]}'])
def test_patches_that_are_none_are_refused_where_they_would_be_applied(records: str, rounded: Path) -> None:
    """And nowhere else: a run starts from the weights alone."""
    (rounded / "records.json").write_text(records)
    with pytest.raises(CheckpointError, match=r"patches in records.json are no list of forward patches"):
        compresso.load(rounded)
    raw = {"name": "mine", "stages": [{"magnitude_structured": {"keep": 0.8}}]}
    assert not any("weights alone" in note for note in compresso.plan(raw, rounded)["notes"])
