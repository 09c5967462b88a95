"""Training checkpoints that survive a crash at any moment: a folder is either absent or whole.

A checkpoint `step-000123/` is written by `compresso.checkpoint.atomic` and sealed with a manifest of sha256 sums. A
folder without a manifest, or whose bytes do not match it, is passed over in favour of the one before. Two are kept for
that reason. Nothing is pickled, and no NaN or Inf is written.

    state.safetensors     trainable parameters, buffers, optimizer state
    history.safetensors   the log, as columns
    facts.json            the update, the identity of the run, the skipped updates
    manifest.json         size and sha256 of each of the above; written last
"""

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresso.checkpoint.atomic import clear_leftovers, new_folder, verify_manifest, write_json, write_manifest
from compresso.checkpoint.storage import storage_errors
from compresso.core import strict_json
from compresso.core.counted import counted
from compresso.errors import CheckpointError, NumericError, ResourceError
from compresso.training.history import History

log = logging.getLogger(__name__)

_STATE, _HISTORY, _FACTS = "state.safetensors", "history.safetensors", "facts.json"
_NAME = re.compile(r"step-(\d{6,})")
_LEFT_BY_0_1 = re.compile(r"\.step-\d{6,}\.\d+\.(partial|old)")
"""What killed saves of release 0.1 left, without the name of a machine."""


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
        clear_leftovers(self.folder, _NAME.pattern)
        for left in self.folder.iterdir():
            if _LEFT_BY_0_1.fullmatch(left.name):
                shutil.rmtree(left)
        for path in reversed(self._all()):
            try:
                _verify(path)
            except CheckpointError as damage:
                note = f"checkpoint {path} is damaged, using the checkpoint before it: {damage}"
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
                f"{bad[0]} holds NaN or Inf after {counted(saved.update, 'update')}, so no checkpoint was written;"
                " lower the learning rate"
            )
        target = self.folder / f"step-{saved.update:06d}"
        facts = {
            "format": 1,
            "update": saved.update,
            "identity": dict(saved.identity),
            "skipped": saved.history.skipped,
        }
        try:
            with storage_errors(target):
                with new_folder(target, force=True) as folder:
                    save_file(dict(saved.tensors), folder / _STATE)
                    save_file(saved.history.to_tensors(), folder / _HISTORY)
                    write_json(folder / _FACTS, facts)
                    write_manifest(folder)
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
            facts = strict_json.loads((path / _FACTS).read_bytes())
            history = History.from_tensors(load_file(path / _HISTORY), facts["skipped"])
            return Saved(facts["update"], load_file(path / _STATE), history, facts["identity"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as damage:
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


def _verify(path: Path) -> None:
    """Raise CheckpointError unless the manifest of a checkpoint lists all three files, and they are unchanged."""
    if absent := {_STATE, _HISTORY, _FACTS} - set(verify_manifest(path)):
        raise CheckpointError(f"its manifest does not list {', '.join(sorted(absent))}")
