"""Checkpoints under faults: death or a full disk at every step of a save, damaged bytes, another run's state."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compresso.checkpoint import atomic
from compresso.errors import CheckpointError, NumericError, ResourceError
from compresso.training import checkpoint
from compresso.training.checkpoint import Saved, TrainingCheckpoints
from compresso.training.history import History


def state(update: int) -> Saved:
    tensors = {
        "param/a": torch.full((3, 2), float(update)),
        "optimizer/a/step": torch.tensor(float(update)),
        "param/b": torch.ones(2, dtype=torch.bfloat16),
    }
    rows = [{"update": float(u), "loss": u / 3, **({"target": 0.1} if u > 1 else {})} for u in range(update)]
    return Saved(update, tensors, History(rows, [7]), {"seed": 1, "groups": {"lora": {"lr": 0.1}}})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def check(folder: Path, update: int) -> None:
    """The newest checkpoint of the folder is whole and that of an update."""
    checkpoints = TrainingCheckpoints(folder)
    path = checkpoints.latest()
    assert path is not None
    found, wanted = checkpoints.load(path), state(update)
    assert (found.update, found.history, found.identity) == (wanted.update, wanted.history, wanted.identity)
    assert same(dict(found.tensors), dict(wanted.tensors))
    assert not list(folder.glob(".*"))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    TrainingCheckpoints(tmp_path / "new" / "place").save(state(4))
    check(tmp_path / "new" / "place", 4)


def test_the_newest_few_are_kept(tmp_path: Path):
    checkpoints = TrainingCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for update in (2, 4, 6, 1_000_000):
        checkpoints.save(state(min(update, 6)) if update < 7 else Saved(update, {}, History(), {}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000006", "step-1000000"]
    with pytest.raises(CheckpointError, match="keep=0"):
        TrainingCheckpoints(tmp_path, keep=0)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return damage


@pytest.mark.parametrize("name", ["state.safetensors", "history.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [truncate, flip(0), flip(0.5), flip(1), Path.unlink],
    ids=["truncated", "flip0", "flip50", "flip100", "missing"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]):
    checkpoints = TrainingCheckpoints(tmp_path)
    checkpoints.save(state(2))
    damage(checkpoints.save(state(4)) / name)
    if name == "manifest.json" and checkpoints.latest() == tmp_path / "step-000004":
        pytest.fail("a changed manifest was believed")
    fresh = TrainingCheckpoints(tmp_path)
    assert fresh.latest() == tmp_path / "step-000002"
    assert len(fresh.notes) == 1 and "step-000004 is" in fresh.notes[0] and "\n" not in fresh.notes[0]
    check(tmp_path, 2)
    fresh.save(state(4))  # the run goes on and replaces it
    check(tmp_path, 4)


def test_all_damaged_is_none(tmp_path: Path):
    checkpoints = TrainingCheckpoints(tmp_path)
    for update in (2, 4):
        (checkpoints.save(state(update)) / "manifest.json").write_text("[]" if update == 2 else '{"files": {}}')
    assert checkpoints.latest() is None and len(checkpoints.notes) == 2


def test_a_passed_over_checkpoint_does_not_push_out_a_good_one(tmp_path: Path):
    checkpoints = TrainingCheckpoints(tmp_path, keep=2)
    for update in (2, 4, 6):
        path = checkpoints.save(state(update))
    truncate(path / "state.safetensors")
    checkpoints.save(state(5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


class Dead(BaseException):
    """A killed process: nothing runs after it, clean-up neither."""


def at_call(monkeypatch: pytest.MonkeyPatch, k: int, fault: BaseException, lasting: bool) -> list[int]:
    """Let the k-th file operation of a save fail, after it did half of its work; returns the count of calls."""
    calls = [0]

    def wrap(owner: object, name: str, half: Callable[..., None] | None = None) -> None:
        real = getattr(owner, name)

        def broken(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == k:
                if half:
                    half(*args)
                raise fault
            if lasting and calls[0] > k:
                raise fault
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    wrap(checkpoint, "save_file", lambda tensors, path: path.write_bytes(b"half"))
    wrap(os, "fsync")
    wrap(os, "write", lambda descriptor, data, write=os.write: write(descriptor, data[: len(data) // 2]))
    wrap(atomic, "exchange")
    wrap(Path, "replace")
    wrap(Path, "mkdir")
    wrap(shutil, "rmtree", lambda path, **how: [file.unlink() for file in sorted(Path(path).glob("*"))[:1]])
    return calls


@pytest.mark.parametrize("kernel_swaps", [True, False])
@pytest.mark.parametrize("existing", ["the one before", "a damaged one of the same name"])
def test_death_at_any_step_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, existing: str, kernel_swaps: bool, monkeypatch: pytest.MonkeyPatch
):
    if not kernel_swaps:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    k, calls = 0, [0]
    while k <= calls[0]:
        k += 1
        folder = tmp_path / str(k)
        before = TrainingCheckpoints(folder, keep=1 if existing == "the one before" else 2)
        before.save(state(2))
        if existing != "the one before":
            truncate(before.save(state(4)) / "state.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, k, Dead(), lasting=True)
            try:
                before.save(state(4))
            except Dead:
                pass
            else:
                assert calls[0] < k
        newest = TrainingCheckpoints(folder).latest()
        assert newest is not None
        check(folder, int(newest.name[-1]))
    assert k > 10  # the loop did meet the save's operations


def test_a_refusing_disk_is_reported_and_harms_nothing(tmp_path: Path):
    k, calls = 0, [0]
    while k <= calls[0]:
        k += 1
        folder = tmp_path / str(k)
        checkpoints = TrainingCheckpoints(folder, keep=2)
        checkpoints.save(state(2))
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, k, OSError(errno.ENOSPC, "No space left on device"), lasting=False)
            try:
                checkpoints.save(state(4))
            except ResourceError as refusal:
                assert "No space left on device. Free space" in str(refusal) and refusal.exit_code == 3
            else:
                assert calls[0] < k
        newest = TrainingCheckpoints(folder).latest()
        assert newest is not None
        check(folder, int(newest.name[-1]))
    assert k > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_never_written(tmp_path: Path, value: float):
    saved = state(4)
    bad = Saved(4, {**saved.tensors, "param/c": torch.tensor([1.0, value])}, saved.history, saved.identity)
    with pytest.raises(NumericError, match="param/c holds NaN or Inf after 4 updates, so no checkpoint was written"):
        TrainingCheckpoints(tmp_path).save(bad)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled(tmp_path: Path):
    path = TrainingCheckpoints(tmp_path).save(state(4))
    assert sorted(p.name for p in path.iterdir()) == [
        "facts.json",
        "history.safetensors",
        "manifest.json",
        "state.safetensors",
    ]
    assert sorted(json.loads((path / "manifest.json").read_text())["files"]) == [
        "facts.json",
        "history.safetensors",
        "state.safetensors",
    ]


def test_a_checkpoint_of_release_0_1_is_continued_and_what_its_crashes_left_is_removed(tmp_path: Path):
    """Its manifest has no format, and its unfinished folders no name of a machine."""
    path = TrainingCheckpoints(tmp_path).save(state(2))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.pop("format") == 1
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for kind in ("partial", "old"):
        shutil.copytree(path, tmp_path / f".step-000004.{os.getpid()}.{kind}")
    check(tmp_path, 2)
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    assert TrainingCheckpoints(tmp_path).latest() is None


def test_a_manifest_that_leaves_out_a_file_is_not_believed(tmp_path: Path):
    path = TrainingCheckpoints(tmp_path).save(state(2))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["state.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoints = TrainingCheckpoints(tmp_path)
    assert checkpoints.latest() is None
    assert "does not list state.safetensors" in checkpoints.notes[0]
