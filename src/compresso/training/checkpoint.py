"""Training checkpoints that survive a crash at any moment: a folder is either absent or whole.

A checkpoint `step-000123/` is built beside its final name, synced, sealed with a manifest of sha256 sums, and renamed.
A folder without a manifest, or whose bytes do not match it, is passed over in favour of the one before. Two are kept
for that reason. Nothing is pickled, and no NaN or Inf is written.

    state.safetensors     trainable parameters, buffers, optimizer state
    history.safetensors   the log, as columns
    facts.json            the update, the identity of the run, the skipped updates
    manifest.json         size and sha256 of each of the above; written last
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresso.errors import CheckpointError, NumericError, ResourceError, ResumeError
from compresso.training.history import History

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = re.compile(r"\.step-\d{6,}\.\d+\.(partial|old)")


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory: `update` updates are done; `tensors` as `state.collect` names them."""

    update: int
    tensors: Mapping[str, Tensor]
    history: History
    identity: Mapping[str, Any]


class TrainingCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live; made when the first one is saved.
        identity: what must be equal for a resume to continue the same run (recipe, model, data, versions); JSON values,
            nested as you like.
        keep: how many to keep, at least 1.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any] | None = None, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"keep={keep} checkpoints, wanted at least 1")
        self.folder = Path(folder)
        self.identity = dict(identity or {})
        self.keep = keep
        self.notes: list[str] = []
        """What was found damaged, one sentence each, for the run's records."""

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None; removes what crashed saves left, and notes damaged checkpoints that it
        passes over.
        """
        if not self.folder.is_dir():
            return None
        for left in self.folder.iterdir():
            if _PARTIAL.fullmatch(left.name):
                shutil.rmtree(left)
        for path in reversed(self._all()):
            try:
                _verify_manifest(path)
            except CheckpointError as damage:
                note = f"{damage}; using the checkpoint before it"
                log.warning(note)
                self.notes.append(note)
            else:
                return path
        return None

    def save(self, saved: Saved) -> Path:
        """Write a checkpoint, then remove those that are too many.

        Raises:
            NumericError: a tensor holds NaN or Inf.
            ResourceError: the disk refused.
        """
        bad = [name for name, t in saved.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if bad:
            raise NumericError(
                f"{bad[0]} holds NaN or Inf after {saved.update} updates, so no checkpoint was written; lower the"
                " learning rate"
            )
        target = self.folder / f"step-{saved.update:06d}"
        facts = {
            "format": 1,
            "update": saved.update,
            "identity": dict(saved.identity),
            "skipped": saved.history.skipped,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _new_folder(target, force=True) as folder:
                save_file(dict(saved.tensors), folder / "state.safetensors")
                save_file(saved.history.to_tensors(), folder / "history.safetensors")
                (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
                _write_manifest(folder)
            self._prune(target)
        except (OSError, SafetensorError) as refusal:
            raise ResourceError(
                f"{target} could not be written: {refusal}; free some space or choose another output folder"
            ) from refusal
        return target

    def load(self, path: Path) -> Saved:
        """Read a checkpoint that `latest` returned.

        Raises:
            CheckpointError: it changed since.
        """
        try:
            facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
            history = History.from_tensors(load_file(path / "history.safetensors"), facts["skipped"])
            return Saved(facts["update"], load_file(path / "state.safetensors"), history, facts["identity"])
        except (OSError, ValueError, KeyError, SafetensorError) as damage:
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {damage}; remove it to use the one before"
            ) from damage

    def _all(self) -> list[Path]:
        found = [
            (int(match[1]), path)
            for path in self.folder.iterdir()
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        return [path for _, path in sorted(found)]

    def _prune(self, newest: Path) -> None:
        # whatever is newer than a checkpoint just written was passed over as damaged when this run resumed
        everything = self._all()
        at = everything.index(newest)
        for path in everything[: max(0, at + 1 - self.keep)] + everything[at + 1 :]:
            shutil.rmtree(path)


def refuse_other_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        ResumeError: lists every differing field with both values.
    """
    before, now = _flat(found), _flat(json.loads(json.dumps(wanted)))
    absent = "absent"
    differing = [
        f"{k} was {before.get(k, absent)!r}, is {now.get(k, absent)!r}"
        for k in sorted(before.keys() | now.keys())
        if before.get(k, absent) != now.get(k, absent)
    ]
    if differing:
        raise ResumeError(
            f"{path} belongs to another run: {'; '.join(differing)}. Restore these, or start afresh in another output"
            " folder"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well, and is removed when it does not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists already; use force to replace it")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _verify_manifest(folder: Path) -> None:
    """Raises CheckpointError unless every file of the folder is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != files.keys():
            raise CheckpointError(
                f"checkpoint {folder} is damaged: it holds {sorted(present)}, its manifest lists {sorted(files)}"
            )
        for name, facts in files.items():
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} has {size} bytes, not {facts['bytes']}")
            if _sha256(folder / name) != facts["sha256"]:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged: the bytes of {name} changed since they were written"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {damage}") from damage


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
