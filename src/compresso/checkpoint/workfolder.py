"""The folder beside the output in which a run is built: its identity, its finished stages, its training checkpoints.

    OUTPUT.partial/
      identity.json        what a resume must agree on
      stages/01-NAME/      a finished stage: checkpoint, plan.json, records.json and a manifest written last
      training/NAME/       training checkpoints of the running stage
      checkpoint/          the result, renamed to OUTPUT when it is complete

One process at a time owns it (a lock beside it). It is removed after the result stands.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compresso.checkpoint.atomic import lock, new_folder, verify_manifest, write_json, write_manifest
from compresso.errors import CheckpointError, ResumeError

log = logging.getLogger(__name__)


class WorkFolder:
    """Use through `WorkFolder.open`."""

    def __init__(self, path: Path) -> None:
        """path: the folder itself, already owned by this process."""
        self.path = path

    @staticmethod
    @contextmanager
    def open(output: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> Iterator["WorkFolder"]:
        """Own the work folder of an output for a run, new or resumed.

        Raises:
            CheckpointError: if another run owns it, or an interrupted run lies there and neither `resume` nor `force` was said.
            ResumeError: if there is nothing to resume, or it was another run: the differing fields are named.
        """
        path = output.with_name(output.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path):
            written = path / "identity.json"
            if resume:
                if not written.is_file():
                    raise ResumeError(f"nothing to resume: {path} holds no interrupted run; leave --resume out to start one")
                _agree(json.loads(written.read_text("utf-8")), dict(identity))
            elif path.exists() and any(path.iterdir()):
                if not force:
                    raise CheckpointError(f"{path} holds an interrupted run; continue it with --resume or discard it with --force")
                shutil.rmtree(path)
            path.mkdir(exist_ok=True)
            if not resume:
                write_json(written, dict(identity))
            yield WorkFolder(path)

    def finished(self) -> list[Path]:
        """Folders of finished stages, in order; stops at the first that is missing or damaged (which is then done again)."""
        done: list[Path] = []
        for folder in sorted((self.path / "stages").glob("[0-9][0-9]-*")):
            try:
                verify_manifest(folder)
            except CheckpointError as error:
                log.warning("stage %s is done again: %s", folder.name, error)
                break
            done.append(folder)
        return done

    def save_stage(self, index: int, name: str, write: Callable[[Path], None]) -> Path:
        """Write a finished stage completely or not at all; its training checkpoints are then dropped."""
        target = self.path / "stages" / f"{index + 1:02d}-{name}"
        target.parent.mkdir(exist_ok=True)
        with new_folder(target, force=True) as folder:
            write(folder)
            write_manifest(folder)
        shutil.rmtree(self.training(name), ignore_errors=True)
        return target

    def training(self, name: str) -> Path:
        """Where a stage keeps its training checkpoints."""
        return self.path / "training" / name

    def discard(self) -> None:
        """Remove everything: the result stands elsewhere."""
        shutil.rmtree(self.path)


def _agree(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ResumeError naming the fields in which two identities differ."""
    differing = [
        f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if json.dumps(before.get(name), sort_keys=True) != json.dumps(now.get(name), sort_keys=True)
    ]
    if differing:
        raise ResumeError(f"cannot resume another run: {'; '.join(differing)}. Give the same arguments, or start anew with --force")
