"""A save that fails at any system call, or on a disk that is full, leaves the old checkpoint as it was."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from compresso.checkpoint.atomic import sha256
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.errors import ResourceError
from compresso.formats.hf import save_checkpoint

from .narrow import EVEN, UNEVEN, n_parameters, narrow_model


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def fail_at(patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Make the at-th of the patched calls fail with ENOSPC; the returned list holds the number of calls so far."""
    calls = [0]

    def wrap(call: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return wrapped

    for name in ("write", "fsync", "replace"):
        patch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def test_failure_at_every_call_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    old, new = narrow_model("llama", EVEN), narrow_model("qwen2", UNEVEN)
    save_checkpoint(old, EVEN, folder)
    before, failures = digests(folder), 0
    for at in range(1, 99):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, at)
            try:
                save_checkpoint(new, UNEVEN, folder, force=True, files={"plan.json": "{}"})
            except ResourceError as error:
                assert error.exit_code == 3
                failures += 1
        if calls[0] < at:
            break
        if digests(folder) != before:
            assert calls[0] == at  # the very last call: forcing the swap itself to disk
            assert n_parameters(load_model(open_source(folder))) == n_parameters(new)
            save_checkpoint(old, EVEN, folder, force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert failures == at - 1 > 10
    assert n_parameters(load_model(open_source(folder))) == n_parameters(new)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save_checkpoint(narrow_model("llama", EVEN), EVEN, folder)
    before = digests(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(ResourceError, match=r"cannot write .*out: File too large"):
            save_checkpoint(narrow_model("llama", UNEVEN), UNEVEN, folder, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert digests(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
