"""The operating system's side of safe writing: errors in our words, forcing to disk, swapping two folders, asking for a
process.

Unusual: safetensors and tokenizers report I/O failures as other exceptions, with the errno only in the text; numpy and
torch without one.
"""

import ctypes
import errno
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compresso.errors import CheckpointError, CompressoError, ResourceError

HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:24] or "host"
"""This machine, in names of temporary files: a process id says nothing about those of another."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.EISDIR,
    errno.ELOOP,
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written|PytorchStreamWriter failed|file write failed")
"""What numpy and torch say, without an errno, of a write that the disk took a part of."""


def storage_error(path: Path, error: Exception) -> CompressoError | None:
    """The error a person should see for a failed write to `path`, or None if it says nothing about storage."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (match := _OS_ERROR.search(str(error))):
        code = int(match[1])
    if code is None and (_CUT_SHORT.search(str(error)) or (isinstance(error, OSError) and not str(error))):
        return ResourceError(f"cannot write {path}: the disk took a part of it. Free space or choose another output.")
    if code in _FULL:
        return ResourceError(f"cannot write {path}: {os.strerror(code)}. Free space or choose another output.")
    if code in _REFUSED:
        return CheckpointError(f"cannot write {path}: {os.strerror(code)}. Choose an output that you may write to.")
    return None


@contextmanager
def storage_errors(path: Path, only_resource: bool = False) -> Iterator[None]:
    """Turn storage failures inside the block into ResourceError (full or broken disk) or CheckpointError (not allowed).

    `only_resource` leaves the second kind alone, for blocks in which other files than `path` are touched too.
    """
    try:
        yield
    except CompressoError:
        raise
    except Exception as error:  # tokenizers and torch say it by errors of no kind of their own
        known = storage_error(path, error)
        if known is None or (only_resource and not isinstance(known, ResourceError)):
            raise
        raise known from error


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything in it to disk, entries after contents."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not (path := Path(root, name)).is_symlink():
                sync(path)
        sync(Path(root))


def with_ordinary_modes(folder: Path) -> None:
    """Let everybody read a folder's files who may read the folder itself; libraries make some readable by their owner
    alone.
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for name in files:
            if not (path := Path(root, name)).is_symlink():
                path.chmod(mode)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the kernel or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_cwd, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h>
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), flag) == 0


def alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs, and is someone else's
    return True
