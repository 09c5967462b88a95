"""Folders for files that no one keeps."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import compresso
from compresso.checkpoint.scratch import check_scratch, scratch_beside, scratch_folder
from compresso.checkpoint.storage import HOST
from compresso.errors import ResourceError


def dead() -> int:
    """The id of a process that is gone."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_they_go_with_their_block_and_take_those_of_dead_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"compresso-{HOST}-{dead()}-abc").mkdir()
    kept = [f"compresso-{HOST}-{os.getppid()}-abc", f"compresso-elsewhere-{dead()}-abc", "compresso-mine"]
    for name in kept:
        (tmp_path / name).mkdir()
    with scratch_folder() as folder:
        (folder / "x").write_text("x")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, folder.name])
    with pytest.raises(KeyError), scratch_folder():
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_beside_a_file(tmp_path: Path) -> None:
    left = tmp_path / f".x.gguf.{HOST}.{dead()}.partial"
    left.mkdir()
    with scratch_beside(tmp_path / "x.gguf") as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert not list(tmp_path.iterdir())


def test_no_place_for_them_is_said_before_the_work(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    said = r"TMPDIR=.*gone cannot be written to \(No such file or directory\)\. Set TMPDIR"
    for work in (
        check_scratch,
        lambda: compresso.run("magnitude/50", tiny_folder, output=tmp_path / "out"),
        lambda: compresso.measure([tiny_folder]),
        lambda: compresso.verify(tiny_folder),
    ):
        with pytest.raises(ResourceError, match=said):
            work()
    assert not list(tmp_path.iterdir())
