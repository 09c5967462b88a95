"""A journal of rounds: what was written is read, bit for bit, and damage costs the rounds behind it."""

import json
import logging
import math
from pathlib import Path

import pytest

from compresso.errors import ResumeError
from compresso.training.rounds import RoundJournal

SAME = {"run": {"recipe": "r", "seed": 3}, "knobs": [1, 2.5]}
VALUES = [{"loss": 0.1 + 0.2}, [1, None, True, "é"], 5e-324, {"kept": {"a": [0, 2]}}]


def filled(folder: Path) -> Path:
    journal = RoundJournal(folder, SAME)
    for value in VALUES:
        journal.append(value)
    return folder


def test_a_second_journal_reads_what_the_first_wrote_and_goes_on(tmp_path: Path) -> None:
    folder = filled(tmp_path / "deep" / "rounds")
    again = RoundJournal(folder, SAME)
    assert again.entries() == VALUES
    again.append("fifth")
    assert RoundJournal(folder, SAME).entries() == [*VALUES, "fifth"]
    RoundJournal(folder, SAME).append("sixth")  # without having read
    assert RoundJournal(folder, SAME).entries() == [*VALUES, "fifth", "sixth"]


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "no object", "empty"])
def test_a_damaged_round_and_those_behind_it_are_dropped(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = filled(tmp_path / "rounds")
    entry = folder / "round-000001.json"
    text = entry.read_text()
    if damage == "missing":
        entry.unlink()
    else:
        entry.write_text(
            {"cut": text[:-5], "altered": text.replace("1", "7", 1), "no object": "[]", "empty": ""}[damage]
        )
    with caplog.at_level(logging.WARNING):
        assert RoundJournal(folder, SAME).entries() == VALUES[:1]
    assert [path.name for path in sorted(folder.iterdir())] == ["round-000000.json", "same.json"]
    assert ("round 1 is done again" in caplog.text) == (damage != "missing")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    folder = filled(tmp_path / "rounds")
    (folder / ".round-000004.json.host.99.tmp").write_text("{")
    (folder / "kept.txt").write_text("not ours")
    assert RoundJournal(folder, SAME).entries() == VALUES
    assert not list(folder.glob(".*")) and (folder / "kept.txt").is_file()


def test_another_search_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "rounds")
    other = {**SAME, "run": {"recipe": "r", "seed": 4}}
    for act in (RoundJournal(folder, other).entries, lambda: RoundJournal(folder, other).append(1)):
        with pytest.raises(ResumeError, match=r"run\.seed was 3, is 4"):
            act()
    assert RoundJournal(folder, SAME).entries() == VALUES


def test_rounds_whose_owner_cannot_be_read_are_dropped(tmp_path: Path) -> None:
    folder = filled(tmp_path / "rounds")
    (folder / "same.json").write_text("{")
    journal = RoundJournal(folder, SAME)
    assert journal.entries() == []
    journal.append(1)
    assert json.loads((folder / "same.json").read_text()) == SAME and RoundJournal(folder, SAME).entries() == [1]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    journal = RoundJournal(tmp_path / "rounds", SAME)
    journal.append(1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"loss": math.nan})
    journal.append(2)
    assert RoundJournal(tmp_path / "rounds", SAME).entries() == [1, 2]


def test_discarding_starts_anew(tmp_path: Path) -> None:
    journal = RoundJournal(filled(tmp_path / "rounds"), SAME)
    journal.discard()
    assert journal.entries() == [] and not (tmp_path / "rounds").exists()
    RoundJournal(tmp_path / "rounds", {"of": 2}).append(3)
    assert RoundJournal(tmp_path / "rounds", {"of": 2}).entries() == [3]
