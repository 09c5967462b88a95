"""Folders for files that no one keeps, in the system's place for such (TMPDIR) or beside what is being written.

They go when their block ends. What a killed process left is found by the process id in its name, and goes with the next
one.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compresso.checkpoint.atomic import clear_leftovers
from compresso.checkpoint.storage import HOST, alive, storage_errors
from compresso.errors import ResourceError

_NAME = re.compile(rf"compresso-{re.escape(HOST)}-(?P<pid>\d+)-\w+")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder for temporary files, removed at the end.

    Raises:
        ResourceError: there is no place for such, or it is full.
    """
    folder = new_scratch()
    try:
        with storage_errors(folder, only_resource=True):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder beside a file that is to be written, on its disk, removed at the end.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: writing is not allowed there.
    """
    folder = target.with_name(f".{target.name}.{HOST}.{os.getpid()}.partial")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, re.escape(target.name))
        folder.mkdir()
    try:
        with storage_errors(target, only_resource=True):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_scratch() -> None:
    """Raise ResourceError if temporary files cannot be written, before the work that ends with them."""
    with scratch_folder() as folder, storage_errors(folder):
        (folder / "probe").write_bytes(b"compresso")


def new_scratch() -> Path:
    """A new folder of this process, after those of killed ones are gone; who asks removes it.

    Raises:
        ResourceError: there is no place for such.
    """
    try:
        place = Path(tempfile.gettempdir())
        for path in place.glob(f"compresso-{HOST}-*"):
            match = _NAME.fullmatch(path.name)
            if match and int(match["pid"]) != os.getpid() and not alive(int(match["pid"])):
                shutil.rmtree(path, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"compresso-{HOST}-{os.getpid()}-"))
    except OSError as error:
        place = os.environ.get("TMPDIR")
        named = f"TMPDIR={place} cannot be written to" if place else "no folder for temporary files can be written to"
        raise ResourceError(
            f"{named} ({error.strerror or error}). Set TMPDIR to a folder with some space, and free some"
        ) from error
