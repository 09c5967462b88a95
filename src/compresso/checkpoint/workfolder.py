"""The folder beside the output in which a run is built: its identity, its finished stages, its training checkpoints.

    OUTPUT.partial/
      identity.json        what a resume must agree on
      clock.json           the time that all pieces of the run have taken so far
      stages/01-NAME/      a finished stage: checkpoint, plan.json, records.json and a manifest written last
      training/NAME/       training checkpoints of the running stage
      targets/NAME/        a finished result of a run that has several

One process at a time owns it (a lock beside it). It is removed after the result stands, and when a run fails before it
has anything worth resuming. Only a folder that a run made is ever removed: whatever else has that name is left alone.
"""

import logging
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compresso.checkpoint.atomic import lock, new_folder, verify_manifest, write_json, write_manifest
from compresso.checkpoint.identity import differences
from compresso.checkpoint.storage import storage_errors
from compresso.core import strict_json
from compresso.errors import CheckpointError, Interrupted, ResumeError

log = logging.getLogger(__name__)

_IDENTITY = "identity.json"
_ENTRIES = ("step-*", "batch-*", "round-*.json")
"""What training, sweeps, passes over data and rounds leave of a stage that goes on."""
_MOST_SAID = 12
"""Fields that differ between a run and the one that it would resume; of a recipe that was written anew, most do."""


class WorkFolder:
    """Use through `WorkFolder.open`; other processes of the same run make their own from the path."""

    def __init__(self, path: Path) -> None:
        """path: the folder itself, owned by this run."""
        self.path = path

    @staticmethod
    def beside(output: Path) -> Path:
        """The work folder's path for an output."""
        output = output.resolve()
        return output.with_name(output.name + ".partial")

    @staticmethod
    def check(
        output: Path, identity: Mapping[str, Any], *, resume: bool, force: bool, unknown: Collection[str] = ()
    ) -> None:
        """Refuse what `open` would refuse, before a run reads its data; nothing is changed.

        Args:
            output, resume, force: as for `open`.
            identity: as far as it is known.
            unknown: dotted names of what is not known yet.

        Raises:
            CheckpointError, ResumeError, ResourceError: as `open`.
        """
        path = WorkFolder.beside(output)
        if path.is_symlink() or path.exists():  # whoever works there has the lock
            with lock(path):
                _refuse(path, identity, resume, force, unknown)
        else:
            _refuse(path, identity, resume, force, unknown)

    @staticmethod
    @contextmanager
    def open(output: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> Iterator["WorkFolder"]:
        """Own the work folder of an output for a run, new or resumed.

        Raises:
            CheckpointError: if another run owns it, an interrupted run lies there and neither `resume` nor `force` was
                said, or something lies there that no run made.
            ResumeError: if there is nothing to resume, or it was another run: the differing fields are named.
            ResourceError: if the disk is full.
            Interrupted: in place of a KeyboardInterrupt, where there is something to resume.
        """
        path = WorkFolder.beside(output)
        with lock(path):
            _refuse(path, identity, resume, force)
            if not resume:
                with storage_errors(path):
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir()
                write_json(path / _IDENTITY, dict(identity))
            work = WorkFolder(path)
            try:
                yield work
            except BaseException as error:
                if not work.worth_resuming():
                    shutil.rmtree(path, ignore_errors=True)
                elif isinstance(error, KeyboardInterrupt):
                    raise Interrupted(signal.SIGINT, str(path)) from error
                elif isinstance(error, Interrupted) and error.saved is None:  # it came where nobody knows of the folder
                    raise Interrupted(error.signal, str(path)) from error
                raise

    def finished(self, names: Sequence[str]) -> list[Path]:
        """Folders of the finished stages among a recipe's, in order; a damaged one and all after it are done again,
        with a warning.
        """
        done: list[Path] = []
        for index, name in enumerate(names):
            folder = self.stage(index, name)
            if not folder.exists():
                break
            try:
                verify_manifest(folder)
            except CheckpointError as error:
                log.warning("stage %s is done again: %s", folder.name, error)
                break
            done.append(folder)
        return done

    def save_stage(self, index: int, name: str, write: Callable[[Path], None]) -> Path:
        """Write a finished stage completely or not at all; its training checkpoints are then dropped."""
        target = self.stage(index, name)
        with new_folder(target, force=True) as folder:
            write(folder)
            write_manifest(folder)
        shutil.rmtree(self.training(name), ignore_errors=True)
        return target

    def training(self, name: str) -> Path:
        """Where a stage keeps its training checkpoints."""
        return self.path / "training" / name

    def target(self, name: str) -> Path:
        """Where one of several results lies until all are there."""
        return self.path / "targets" / name

    def has_target(self, name: str) -> bool:
        """Whether it lies there whole: it was renamed to its name."""
        return (self.target(name) / "records.json").is_file()

    def discard(self) -> None:
        """Remove everything: the result stands elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)

    def stage(self, index: int, name: str) -> Path:
        """Where a finished stage lies."""
        return self.path / "stages" / f"{index + 1:02d}-{name}"

    def worth_resuming(self) -> bool:
        """Whether anything in it was finished, or was begun and saved."""
        found = ("stages/[0-9][0-9]-*", *(f"training/**/{entry}" for entry in _ENTRIES))
        return any(True for pattern in found for _ in self.path.glob(pattern))


def _refuse(path: Path, identity: Mapping[str, Any], resume: bool, force: bool, unknown: Collection[str] = ()) -> None:
    """Raise what `WorkFolder.open` says of what lies at its path."""
    refuse_unowned(path)
    if resume and (differing := differences(found := _identity(path), identity, unknown)):
        was, now = _recipe(found), _recipe(identity)
        if was != now:
            raise ResumeError(
                f"cannot resume another run: {path} holds one of recipe {was}, and this is {now}. Give {was} or another"
                f" output, or start anew with --overwrite"
            )
        more = f"; and {len(differing) - _MOST_SAID} more" if len(differing) > _MOST_SAID else ""
        raise ResumeError(
            f"cannot resume another run: {'; '.join(differing[:_MOST_SAID])}{more}. Give the same arguments, or start"
            " anew with --overwrite"
        )
    if not resume and not force and path.exists() and WorkFolder(path).worth_resuming():
        raise CheckpointError(
            f"{path} holds an interrupted run; continue it with --resume or discard it with --overwrite"
        )


def _recipe(identity: Mapping[str, Any]) -> str | None:
    """The name of a run's recipe, where its identity has one."""
    recipe = identity.get("recipe")
    return str(recipe["name"]) if isinstance(recipe, Mapping) and "name" in recipe else None


def refuse_unowned(path: Path) -> None:
    """Raise CheckpointError if something lies at a work folder's path that no run made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CheckpointError(
            f"{path} is in the way: a run keeps its unfinished work there. Move it, or choose another output."
        )
    if path.is_dir() and any(path.iterdir()) and not (path / _IDENTITY).is_file():
        raise CheckpointError(
            f"{path} is in the way: no run made it, and a run keeps its unfinished work there. Choose another output."
        )


def _identity(path: Path) -> dict[str, Any]:
    """What the interrupted run wrote of itself."""
    if not (path / _IDENTITY).is_file():
        raise ResumeError(f"nothing to resume: {path} holds no interrupted run; leave --resume out to start one")
    try:
        found = strict_json.loads((path / _IDENTITY).read_bytes())
    except ValueError as error:
        raise ResumeError(f"{path / _IDENTITY} is damaged ({error}); start anew with --overwrite") from error
    if not isinstance(found, dict):
        raise ResumeError(f"{path / _IDENTITY} is damaged (no object); start anew with --overwrite")
    return found
