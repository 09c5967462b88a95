"""Writing files and folders so that a crash at any instant leaves the old content or the new, never a mix.

Everything is written beside its target, forced to disk and renamed. A folder that replaces an old one is swapped with
it by a single system call where the kernel offers one (Linux); elsewhere by two renames, the first of which is undone
if the second fails. What a killed process left behind is found by the process id in its name and removed, or put back
if the target is missing.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from compresso.checkpoint.overwrite import Written, how_to_replace
from compresso.checkpoint.storage import (
    HOST,
    alive,
    exchange,
    storage_error,
    storage_errors,
    sync,
    sync_tree,
    with_ordinary_modes,
)
from compresso.core import strict_json
from compresso.errors import CheckpointError, ResourceError

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

MANIFEST = "manifest.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ResourceError: the disk is full or broken.
        CheckpointError: writing is not allowed.
    """
    with new_file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]  # a write may be short
        finally:
            os.close(descriptor)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to: that file becomes `target` when the block ends well, and goes when it does
    not. What killed processes left beside it goes first.

    Raises:
        ResourceError: the disk is full or broken.
        CheckpointError: writing is not allowed.
    """
    temporary = target.with_name(f".{target.name}.{HOST}.{os.getpid()}.tmp")
    with storage_errors(target):
        clear_leftovers(target.parent, re.escape(target.name))
        try:
            yield temporary
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; errors as in `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON whole or not at all; NaN is refused with ValueError, other errors as in `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(target: Path | str, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes when it does not.

    With `force` the old folder is exchanged for the new one after the new one is complete and on disk.

    Raises:
        CheckpointError: `target` is a non-empty folder (without `force`) or a file.
        ResourceError: the disk is full or broken.
    """
    target = Path(target).resolve()  # a link to a folder stays a link
    refuse_occupied(target, force)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, re.escape(target.name))
        temporary = target.with_name(f".{target.name}.{HOST}.{os.getpid()}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with storage_errors(target, only_resource=True):
            yield temporary
        with storage_errors(target):
            with_ordinary_modes(temporary)
            sync_tree(temporary)
            refuse_occupied(target, force)  # someone else may have been faster
            _install(temporary, target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_occupied(target: Path, force: bool, written: Written | None = None) -> None:
    """Raise CheckpointError if `target` may not be written: a file, a non-empty folder without `force`, or a folder we
    stand in. written: what `force` would replace, if that is known; else it is offered for whatever lies there.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output {target} is a file; a folder is wanted. Choose another output.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        unseen = ". Choose another output, or add --overwrite to replace what a run wrote."
        cure = unseen if written is None else how_to_replace(target, written)
        raise CheckpointError(f"output {target} exists and is not empty{cure}")
    for precious, what in ((Path.cwd(), "the working folder"), (Path.home(), "your home folder")):
        if precious.resolve().is_relative_to(target):
            raise CheckpointError(
                f"output {target} holds {what} and will not be replaced even with --overwrite. Choose another output."
            )


def check_output(
    output: Path | str, model_path: Path | str | None, force: bool = False, written: Written | None = None
) -> None:
    """Refuse an unusable output folder before any work is done; nothing is created.

    Args:
        output: the folder.
        model_path: the input model.
        force: whether the folder may be replaced.
        written: what `force` would replace, so that nothing else is told to use it.

    Raises:
        CheckpointError: it is, holds or lies in the input model (also through links), is occupied without `force`, or
            its parent cannot be written.
        ResourceError: its disk is full.
    """
    output = Path(output).resolve()
    model = Path(model_path).resolve() if model_path is not None else None
    if model is not None and model.exists():
        folder = model if model.is_dir() else model.parent
        if folder == output or (output.exists() and output.samefile(folder)):
            raise CheckpointError(f"output {output} is the folder of the input model. Choose another output.")
        if folder.is_relative_to(output):
            raise CheckpointError(f"output {output} holds the input model {folder}. Choose another output.")
        if output.is_relative_to(folder):
            raise CheckpointError(
                f"output {output} lies in the folder of the input model {folder}, which stays as it is. Choose another"
                " output."
            )
    refuse_occupied(output, force, written)
    parent = next(folder for folder in output.parents if folder.exists())
    probe = parent / f".compresso-probe.{HOST}.{os.getpid()}"
    try:
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(known := storage_error(output, error), ResourceError):
            raise known from error
        raise CheckpointError(
            f"output {output} cannot be created: {parent} is not writable ({error.strerror}). Choose another output."
        ) from error


def write_manifest(folder: Path | str) -> None:
    """List every file below `folder`, with size and sha256, in its manifest.json; call it last: it says that the folder
    is complete.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    entries: dict[str, Json] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, {"format": 1, "files": entries})


def verify_manifest(folder: Path | str) -> tuple[str, ...]:
    """Names of the listed files, all of them present and unchanged; files that are not listed are not looked at.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered, or saying that the folder was
            never finished.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    cure = "Use an earlier checkpoint, or write it again."
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: its writing was cut short. {cure}")
    try:
        data = strict_json.loads(path.read_bytes())
        # the manifests of training checkpoints of release 0.1 hold the same files and no format
        if data.get("format", 1) != 1 or data.keys() - {"format", "files"}:
            raise ValueError("unknown format")
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}). {cure}") from error
    for name, (size, digest) in listed.items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path} lists '{name}', which lies outside the folder. Do not use this checkpoint.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. {cure}")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{file} is damaged: {found} bytes instead of {size}. {cure}")
        if sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one in {MANIFEST}. {cure}")
    return tuple(listed)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(folder: Path | str) -> Iterator[None]:
    """Keep other processes from writing the same output while the block runs.

    The lock is the kernel's (flock) on a file beside the folder, not a pid in a file: it goes with the process that
    held it, however that ended, so the file a dead process left is taken over at once and no live process is ever
    mistaken for a dead one. Beside the folder and not inside, because the folder itself is renamed.

    Raises:
        CheckpointError: one already does.
    """
    folder = Path(folder).resolve()
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    held = FileLock(path, timeout=0)
    try:
        with storage_errors(folder):
            held.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another process is writing {folder}. Wait for it to end, or choose another output."
        ) from error
    try:
        yield
    finally:
        with suppress(
            OSError
        ):  # removed while still held: filelock does not accept a lock on a file that lost its name
            path.unlink(missing_ok=True)
        held.release()


def _install(temporary: Path, target: Path) -> None:
    """Make the complete folder `temporary` the folder `target`."""
    if not target.exists() or not any(target.iterdir()):
        temporary.replace(target)
        return
    if exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)  # now the old folder; a leftover is cleared by the next run
        return
    old = target.with_name(f".{target.name}.{HOST}.{os.getpid()}.old")
    target.replace(old)
    try:
        temporary.replace(target)
    except BaseException:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder: Path, names: str) -> None:
    """Remove what killed processes of this machine left of writing; an old folder whose swap was cut short is put back.

    Args:
        folder: in which `new_folder` and `new_file` wrote.
        names: a regular expression that the whole name of a target matches.
    """
    pattern = re.compile(rf"\.(?P<target>{names})\.{re.escape(HOST)}\.(?P<pid>\d+)\.(?P<kind>partial|old|tmp)")
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or (int(match["pid"]) != os.getpid() and alive(int(match["pid"]))):
            continue
        target = folder / match["target"]
        if match["kind"] == "old" and not target.exists():
            path.replace(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
