"""The time of a run that was interrupted is that of all its pieces, or said to be not known; nothing else differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Forked, work_of
from tests.runner.test_crash import outcome

from compresso.data import nano
from compresso.errors import ResourceError
from compresso.report import facts
from compresso.report.read import read_results
from compresso.report.stage_table import stage_table
from compresso.runner import clock as module
from compresso.runner.clock import FILE, Clock

LONG = 5000.0
"""Seconds that no piece here takes."""
Now = Callable[[float], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Now:
    """at(seconds): what the clock's time is from then on."""
    monkeypatch.setattr(module, "BEAT", 1e6)

    def _at(seconds: float) -> None:
        monkeypatch.setattr(module.time, "time", lambda: seconds)

    return _at


def test_pieces_add_up_and_finished_stages_are_forgotten(tmp_path: Path, at: Now) -> None:
    at(100.0)
    with pytest.raises(KeyboardInterrupt), Clock(tmp_path, 90.0, resumed=False) as first, first.stage("a"):
        at(130.0)
        raise KeyboardInterrupt
    at(1000.0)
    with Clock(tmp_path, 1000.0, resumed=True) as second:
        with second.stage("a"):
            at(1007.0)
        assert second.of("a").facts(2) == {"seconds": 37.0}
        second.finished("a")
        with second.stage("b"):
            at(1010.0)
        assert second.of("b").facts(2) == {"seconds": 3.0}
        assert second.run().facts(1) == {"seconds": 50.0}
    at(2000.0)
    with Clock(tmp_path, 2000.0, resumed=True) as third, third.stage("a"):  # done anew: its folder was damaged
        at(2001.0)
    assert third.of("a").seconds == 1.0


def test_a_killed_piece_counts_up_to_its_last_beat(tmp_path: Path, at: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    at(10.0)
    with Clock(tmp_path, 10.0, resumed=False) as clock, clock.stage("a"):
        at(25.0)
        while json.loads((tmp_path / FILE).read_text())["run"]["seconds"] < 15.0:
            pass
        kept = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(kept)  # as if nothing had been written at the end
    with Clock(tmp_path, 25.0, resumed=True) as clock, clock.stage("a"):
        at(26.0)
    assert (clock.of("a").seconds, clock.run().seconds) == (16.0, 16.0)


@pytest.mark.parametrize("held", [None, "{", '{"run": {"seconds": -1}}'])
def test_what_was_not_saved_is_not_known_however_often_it_is_resumed(tmp_path: Path, at: Now, held: str | None) -> None:
    if held is not None:
        (tmp_path / FILE).write_text(held)
    at(0.0)
    with Clock(tmp_path, 0.0, resumed=True):
        at(1.0)
    with Clock(tmp_path, 1.0, resumed=True) as clock:
        with clock.stage("a"):
            at(3.0)
        with clock.stage("b"):
            at(4.0)
    assert clock.of("a").facts(2) == {"seconds": 2.0, "since_resume": True}
    assert clock.of("b").facts(2) == {"seconds": 1.0}
    assert clock.run().facts(1) == {"seconds": 4.0, "since_resume": True}


def test_a_full_disk_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(module, "write_text", full)
    with Clock(tmp_path, 0.0, resumed=False) as clock, clock.stage("a"):
        pass
    assert "the time spent so far is not saved" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_took_what_all_of_its_pieces_took(forked: Forked, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    training = {"steps": 6, "batch": 4, "micro_batch": 4, "save_every": 2}
    recipe.write_text(
        json.dumps(
            {
                "name": "mine",
                "data": {"source": "world", "max_length": 32, "prompt": False, "pack": True, "held": 8},
                "stages": [{"gate_taylor": {"keep": 0.8, "batches": 1}}, {"recover": training}],
            }
        )
    )

    def ran(name: str, *more: str, **event: Any) -> Path:
        output = tmp_path / name
        options = ["--measure", "none", "--no-verify", "--allow-collapsed"]
        arguments = ["run", str(recipe), "--model", str(nano.path()), "--output", str(output), *options, *more]
        code, log = forked(arguments, **event)
        assert code == (143 if event else 0), log
        return output

    whole, killed, older = ran("whole"), ran("killed", event="term", phase="recover", at=3), tmp_path / "older"
    shutil.copytree(work_of(killed), work_of(older))
    (work_of(older) / FILE).unlink()
    saved = json.loads((work_of(killed) / FILE).read_text())
    assert saved["run"]["seconds"] > saved["stages"]["recover"]["seconds"] > 0
    saved["run"]["seconds"], saved["stages"]["recover"]["seconds"] = 2 * LONG, LONG
    (work_of(killed) / FILE).write_text(json.dumps(saved))

    found = {one: read_results([one]).runs[0] for one in (ran("killed", "--resume"), ran("older", "--resume"), whole)}
    records = {one: run.records for one, run in found.items()}
    assert outcome(killed) == outcome(whole) and outcome(older)[0] == outcome(whole)[0]
    assert LONG < (records[killed].stages["recover"].seconds or 0) < 2 * LONG < records[killed].seconds < 3 * LONG
    assert "seconds" in records[killed].stages["gate_taylor"].model_fields_set
    assert (records[older].stages["recover"].since_resume, records[older].since_resume) == (True, True)
    assert not records[older].stages["gate_taylor"].since_resume and not records[killed].since_resume
    time, table = dict(facts.asked(found[older]))["Time"], stage_table(records[older])
    assert str(time).count("s since the resume") == 2 and str(time).endswith("the time before the resume is not known")
    assert table is not None and table.rows[-1][-1].endswith("since the resume")
    assert "since the resume" not in str(dict(facts.asked(found[killed]))["Time"])
