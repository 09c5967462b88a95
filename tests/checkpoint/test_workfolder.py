"""The work folder of a run: owned by one, resumed by the same run only, and never more than its own is removed."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compresso.checkpoint.workfolder import WorkFolder
from compresso.errors import CheckpointError, Interrupted, ResumeError

IDENTITY: dict[str, Any] = {
    "recipe": {"stages": [{"one": {"rate": 0.1, "kinds": ("a", "b")}}, {"two": {}}]},
    "seed": 0,
    "data": None,
}
NAMES = ["one", "two"]


def fill(folder: Path) -> None:
    (folder / "weights").write_text("w")


def interrupted(output: Path, stages: int = 1, identity: Mapping[str, Any] = IDENTITY) -> Path:
    """A run that ended by an exception after some stages."""
    with (
        pytest.raises((KeyboardInterrupt, Interrupted)),
        WorkFolder.open(output, identity, resume=False, force=True) as work,
    ):
        for index in range(stages):
            work.save_stage(index, NAMES[index], fill)
        raise KeyboardInterrupt
    return WorkFolder.beside(output)


def test_a_resumed_run_finds_its_finished_stages(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=True, force=False) as work:
        assert [path.name for path in work.finished(NAMES)] == ["01-one"]
        work.save_stage(1, "two", fill)
        assert [path.name for path in work.finished(NAMES)] == ["01-one", "02-two"]
        work.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_stage_counts_only_with_all_before_it(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "out", stages=2)
    (work / "stages" / "01-one").rename(work / "elsewhere")
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=True, force=False) as resumed:
        assert resumed.finished(NAMES) == []


@pytest.mark.parametrize("damage", [lambda path: path.write_text("x"), Path.unlink], ids=["altered", "missing"])
def test_a_damaged_stage_and_those_after_it_are_done_again(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    work = interrupted(tmp_path / "out", stages=2)
    damage(work / "stages" / "01-one" / "weights")
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=True, force=False) as resumed:
        assert resumed.finished(NAMES) == []
    assert "stage 01-one is done again" in caplog.text


def test_training_checkpoints_go_when_their_stage_is_saved(tmp_path: Path) -> None:
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=False) as work:
        for name in NAMES:
            (work.training(name) / "step-000001").mkdir(parents=True)
        work.save_stage(0, "one", fill)
        assert not work.training("one").exists()
        assert work.training("two").exists()


def test_what_is_not_worth_resuming_is_removed(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "out", stages=0)
    assert not work.exists()
    with (
        pytest.raises(ResumeError, match="holds no interrupted run"),
        WorkFolder.open(tmp_path / "out", IDENTITY, resume=True, force=False),
    ):
        pass
    # a kill leaves the folder; with nothing in it there is nothing to ask about
    work.mkdir()
    (work / "identity.json").write_text("{}")
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=False) as again:
        assert again.path == work


def test_unfinished_work_is_discarded_only_when_told(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"--resume or discard it with --overwrite"):  # noqa: SIM117
        with WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=False):
            pass
    assert (work / "stages" / "01-one").is_dir()
    with WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=True) as again:
        assert again.finished(NAMES) == []


def test_differences_are_named_field_by_field(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    other = {"recipe": {"stages": [{"one": {"rate": 0.2, "kinds": ["a"]}}, {"two": {}}]}, "seed": 0, "layout": "auto"}
    with pytest.raises(ResumeError) as refusal, WorkFolder.open(tmp_path / "out", other, resume=True, force=False):
        pass
    told = str(refusal.value)
    assert "recipe.stages.0.one.rate was 0.1, is 0.2" in told
    assert "recipe.stages.0.one.kinds was ['a', 'b'], is ['a']" in told
    assert "layout was 'absent', is 'auto'" in told
    assert "data was None, is 'absent'" in told
    assert "seed" not in told
    assert "two" not in told


def test_another_recipe_is_said_in_one_line_and_many_fields_are_counted(tmp_path: Path) -> None:
    def told(was: dict[str, Any], now: dict[str, Any]) -> str:
        interrupted(tmp_path / "out", identity=was)
        with pytest.raises(ResumeError) as refusal, WorkFolder.open(tmp_path / "out", now, resume=True, force=False):
            pass
        return str(refusal.value)

    knobs = {f"knob{i:02d}": i for i in range(20)}
    one = {"recipe": {"name": "moe/slim-2-4", "stages": [knobs]}, "seed": 0}
    words = told(one, {"recipe": {"name": "moe/expert-drop", "stages": []}, "seed": 1})
    assert "out.partial holds one of recipe moe/slim-2-4, and this is moe/expert-drop. Give moe/slim-2-4 or" in words
    assert "was" not in words.split("recipe")[1] and "--overwrite" in words
    words = told(one, {"recipe": {"name": "moe/slim-2-4", "stages": [{}]}, "seed": 0})
    assert "knob10 was 10, is 'absent'; and 9 more. Give the same" in words and "knob11" not in words


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=False),
        pytest.raises(CheckpointError, match="another process is writing"),
        WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=True),
    ):
        pass


def test_a_link_to_the_output_has_the_same_work_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert WorkFolder.beside(tmp_path / "link") == WorkFolder.beside(tmp_path / "real") == tmp_path / "real.partial"


@pytest.mark.parametrize("force", [True, False])
def test_what_no_run_made_is_never_removed(tmp_path: Path, force: bool) -> None:
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="no run made it"),
        WorkFolder.open(tmp_path / "out", IDENTITY, resume=False, force=force),
    ):
        pass
    assert (theirs / "thesis.tex").read_text() == "mine"
    (tmp_path / "file.partial").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="in the way"),
        WorkFolder.open(tmp_path / "file", IDENTITY, resume=False, force=force),
    ):
        pass
    assert (tmp_path / "file.partial").read_text() == "mine"


def test_a_damaged_identity_is_no_traceback(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "out")
    for content in ("{", "[]"):
        (work / "identity.json").write_text(content)
        with (
            pytest.raises(ResumeError, match="is damaged"),
            WorkFolder.open(tmp_path / "out", IDENTITY, resume=True, force=False),
        ):
            pass


@pytest.mark.parametrize(
    "entry",
    [
        "stages/01-prune",
        "training/recover/step-000003",
        "training/bonsai/rounds/round-000002.json",
        "training/minitron/scores/batch-000016",
        "training/drop_layers/look/step-000001",
    ],
)
def test_an_interruption_anywhere_says_where_to_go_on(tmp_path: Path, entry: str) -> None:
    """Also where no one notes signals: in the final evaluation, or between two passes of a search."""
    for error in (KeyboardInterrupt(), Interrupted(signal.SIGTERM, None)):
        with (
            pytest.raises(Interrupted) as stop,
            WorkFolder.open(tmp_path / "out", {}, resume=False, force=True) as work,
        ):
            (work.path / entry).mkdir(parents=True)
            raise error
        assert stop.value.saved == str(tmp_path / "out.partial")
        assert stop.value.signal == (signal.SIGTERM if isinstance(error, Interrupted) else signal.SIGINT)
        assert (tmp_path / "out.partial" / entry).exists()


def test_an_interruption_before_anything_was_done_leaves_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), Interrupted(signal.SIGTERM, None)):
        with pytest.raises(type(error)), WorkFolder.open(tmp_path / "out", {}, resume=False, force=False):
            raise error
        assert not list(tmp_path.iterdir())
