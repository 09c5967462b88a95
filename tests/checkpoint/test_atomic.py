"""A failure or kill -9 at any system call of a write leaves the old content or the new; unusable outputs are refused
before any work.
"""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

import compresso
from compresso.checkpoint import atomic
from compresso.checkpoint.atomic import (
    check_output,
    lock,
    new_folder,
    verify_manifest,
    write_bytes,
    write_json,
    write_manifest,
    write_text,
)
from compresso.errors import CheckpointError, ResourceError

OLD = {"a": "old", "sub/b": "old too"}
NEW = {"a": "new", "c": "new only"}
# A process with our modules but without torch: the package itself, which would import it, is replaced by an empty one.
LIGHT = f"""
import os, signal, sys, time, types
from pathlib import Path
sys.modules["compresso"] = package = types.ModuleType("compresso")
package.__path__ = [{str(Path(compresso.__file__).parent)!r}]
from compresso.checkpoint import atomic
"""


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)


class Fault:
    """Makes the k-th call of the patched system calls fail; counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, code: int) -> None:
        self.calls = 0
        for name in ("open", "write", "fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), at, code))

    def _wrap(self, call: Callable, at: int, code: int) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == at:
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize(
    ("code", "error", "exit_code"),
    [(errno.ENOSPC, ResourceError, 3), (errno.EIO, ResourceError, 3), (errno.EACCES, CheckpointError, 2)],
)
def test_file_write_fails_at_every_call(
    code: int, error: type[Exception], exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    for at in range(1, 99):
        path.write_text("old")
        with monkeypatch.context() as patch:
            fault = Fault(patch, at, code)
            try:
                write_text(path, "new")
            except error as raised:
                assert raised.exit_code == exit_code  # type: ignore[attr-defined]
                assert str(path) in str(raised)
            else:
                break
        assert path.read_text() in ("old", "new")
        assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert fault.calls == at - 1 >= 4
    assert path.read_text() == "new"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        write_bytes(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
    write_json(tmp_path / "json", {"é": [1, None]})
    assert (tmp_path / "json").read_text() == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "json", float("nan"))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_folder_fails_at_every_call(exchange: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    fill(target, OLD)
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    failures = 0
    for at in range(1, 99):
        with monkeypatch.context() as patch:
            fault = Fault(patch, at, code)
            try:
                with new_folder(target, force=True) as folder:
                    fill(folder, NEW)
            except ResourceError:
                failures += 1
        if fault.calls < at:
            break
        assert [one.name for one in tmp_path.iterdir() if not one.name.startswith(".")] == [
            "out"
        ]  # clearing up may fail too
        assert read(target) in (OLD, NEW)
        if read(target) == NEW:  # only the last fsync comes after the swap
            fill(target, OLD)
            (target / "c").unlink()
    assert failures >= 10
    assert read(target) == NEW
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


KILLED = """
target, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
if not exchange:
    atomic.exchange = lambda one, other: False
OLD, NEW = {"a": "old", "sub/b": "old too"}, {"a": "new", "c": "new only"}

def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / name, text)

def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}

def count_and_kill(at):
    calls = 0
    def wrap(call):
        def wrapped(*args, **kwargs):
            nonlocal calls
            for step in (lambda: None, lambda: call(*args, **kwargs)):
                result = step()
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped
    for name in ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))

fill(target, OLD)
seen = []
for at in range(1, 999):
    child = os.fork()
    if child == 0:
        count_and_kill(at)
        with atomic.new_folder(target, force=True) as folder:
            fill(folder, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    try:
        with atomic.new_folder(target, force=True):  # what any later run does first: clear up
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert read(target) in (OLD, NEW), (at, read(target))
    assert [path.name for path in target.parent.iterdir()] == [target.name], at
    seen.append(read(target) == NEW)
    if status == 0:
        break
    if seen[-1]:
        with atomic.new_folder(target, force=True) as folder:
            fill(folder, OLD)
assert not seen[0] and seen[-1] and len(seen) > 20
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork: not on this system")
@pytest.mark.parametrize("exchange", [True, False])
def test_folder_survives_kill_at_every_call(exchange: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT + KILLED, tmp_path / "out", str(exchange)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_folder_vanishes_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "deep/out") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):  # what the block reads is not a failed write
        (tmp_path / "absent").read_text()


def test_force_is_needed_and_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", OLD)
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"), new_folder(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"), new_folder(tmp_path / "file", force=True):
        pass
    (tmp_path / "out/work").mkdir()
    monkeypatch.chdir(tmp_path / "out/work")
    with pytest.raises(CheckpointError, match="the working folder"), new_folder(tmp_path / "out", force=True):
        pass
    assert read(tmp_path / "out") == OLD


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not empty"), new_folder(tmp_path / "out") as folder:
        fill(folder, NEW)
        fill(tmp_path / "out", OLD)
    assert read(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        fill(folder, NEW)
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == NEW


def test_output_is_not_the_input(tmp_path: Path) -> None:
    model = tmp_path / "models/one"
    fill(model, {"config.json": "{}"})
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "parent").symlink_to(tmp_path / "models")
    for output in (model, tmp_path / "link", tmp_path / "parent/one", model / "../one"):
        for given in (model, tmp_path / "link", model / "config.json"):
            with pytest.raises(CheckpointError, match="is the folder of the input model"):
                check_output(output, given, force=True)
    with pytest.raises(CheckpointError, match="holds the input model"):
        check_output(tmp_path / "models", model, force=True)
    check_output(tmp_path / "out", model)
    check_output(tmp_path / "out", "owner/name")
    check_output(tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_unusable_output_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "full", OLD)
    with pytest.raises(CheckpointError, match="not empty"):
        check_output(tmp_path / "full", None)
    check_output(tmp_path / "full", None, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not writable"):
        check_output(tmp_path / "file/out", None)
    for code, error in ((errno.EROFS, CheckpointError), (errno.ENOSPC, ResourceError)):
        with monkeypatch.context() as patch:
            Fault(patch, 1, code)
            with pytest.raises(error):
                check_output(tmp_path / "new/out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    if os.geteuid() != 0:
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="not writable"):
            check_output(tmp_path / "shut/out", None)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "escape", "unfinished", "garbled"])
def test_manifest_finds_damage_and_names_the_file(damage: str, tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    write_manifest(tmp_path)
    assert verify_manifest(tmp_path) == ("a", "sub/b")
    victim, manifest = tmp_path / "sub/b", tmp_path / atomic.MANIFEST
    match damage:
        case "truncate":
            victim.write_text("old")
        case "flip":
            victim.write_text("old tOo")
        case "delete":
            victim.unlink()
        case "escape":
            manifest.write_text(manifest.read_text().replace("sub/b", "../b"))
        case "unfinished":
            manifest.unlink()
        case "garbled":
            manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"sub/b|manifest\.json"):
        verify_manifest(tmp_path)


def test_lock_refuses_a_second_process_and_survives_a_dead_one(tmp_path: Path) -> None:
    hold = "with atomic.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    child = subprocess.Popen([sys.executable, "-c", LIGHT + hold, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is writing"), lock(tmp_path / "out"):
            pass
        with lock(tmp_path / "other"):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    assert (tmp_path / ".out.lock").exists()
    with lock(tmp_path / "out"):
        pass
    (tmp_path / ".out.lock").write_text("999999")
    with lock(tmp_path / "out"), pytest.raises(CheckpointError), lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_folder_of_the_input_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for output in (model / "out", model / "inner" / "deep" / "out", tmp_path / "link" / "out", model / "inner"):
        with pytest.raises(CheckpointError, match=r"lies in the folder of the input model .*Choose another output"):
            check_output(output, model)
    with pytest.raises(CheckpointError, match="is the folder of the input model"):
        check_output(tmp_path / "link", model)
    with pytest.raises(CheckpointError, match="holds the input model"):
        check_output(tmp_path, model)
    check_output(tmp_path / "model-small", model)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "link", "model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("11008 requested and 2880 written"),
        OSError(),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_by_whatever_says_it(tmp_path: Path, error: Exception) -> None:
    for written in (atomic.new_file(tmp_path / "a"), new_folder(tmp_path / "b")):
        with (
            pytest.raises(ResourceError, match=r"cannot write .*choose another output|Choose another"),
            written as path,
        ):
            path.write_text("part") if path.name.endswith("tmp") else (path / "x").write_text("part")
            raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_of_a_file_left_goes_with_the_next(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    mine = tmp_path / f".x.gguf.{atomic.HOST}.{int(gone.stdout)}.tmp"
    others = [tmp_path / f".x.gguf.elsewhere.{int(gone.stdout)}.tmp", tmp_path / f".y.gguf.{atomic.HOST}.1.tmp"]
    for path in (mine, *others):
        path.write_text("half")
    with atomic.new_file(tmp_path / "x.gguf") as path:
        assert not mine.exists()
        path.write_text("whole")
    assert (tmp_path / "x.gguf").read_text() == "whole"
    assert all(path.exists() for path in others)
