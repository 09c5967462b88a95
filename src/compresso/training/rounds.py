"""A journal of a search's rounds: plain JSON, numbered, so that a killed search goes on with the same numbers.

Entry `round-000003.json` is what round 3 found, with the sha256 of it. Each is written beside its name, forced to disk
and renamed: it is whole or absent. A damaged or missing entry ends the journal: it and all after it, which may rest on
it, are removed and done again. `same.json` says whose rounds they are.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from compresso.checkpoint.atomic import Json, write_json
from compresso.checkpoint.identity import refuse_other_run
from compresso.core import strict_json
from compresso.errors import CheckpointError
from compresso.training.ranks import ALONE, Ranks

log = logging.getLogger(__name__)
_NAME = re.compile(r"round-(\d{6,})\.json")


class RoundJournal:
    """The finished rounds of one search; for one process at a time, or several that make the same search.

    Args:
        folder: where entries lie; made with the first.
        same: what must be equal for a resume to continue the same search, as JSON: the run, the knobs, the weights.
        ranks: these processes, of which the main one reads and writes.
    """

    def __init__(self, folder: Path, same: Mapping[str, Json], ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks
        self._same: dict[str, Json] = json.loads(json.dumps(same))
        self._n: int | None = None

    def entries(self) -> list[Json]:
        """What the whole rounds found, first to last; those behind a damaged one are removed.

        Raises:
            ResumeError: they are another search's.
        """
        found: list[Json] = []
        with self.ranks.failing_alike():
            if self.ranks.is_main:
                found = self._whole()
                kept = {self._entry(i).name for i in range(len(found))}
                for path in self.folder.iterdir() if self.folder.is_dir() else ():
                    if path.name.endswith(".tmp") or (_NAME.fullmatch(path.name) and path.name not in kept):
                        path.unlink()
        found = self.ranks.agreed(found)
        self._n = len(found)
        return found

    def append(self, value: Json) -> None:
        """Add a round.

        Raises:
            ResourceError: the disk refuses.
            ValueError: NaN and infinities.
        """
        if self._n is None:
            self.entries()
        assert self._n is not None
        if self._n == 0 and self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "same.json", self._same)
        if self.ranks.is_main:
            write_json(self._entry(self._n), {"sha256": _digest(value), "value": value})
        self._n += 1

    def discard(self) -> None:
        """Forget all rounds."""
        if self.folder.is_dir() and self.ranks.is_main:
            shutil.rmtree(self.folder)
        self._n = 0

    def _whole(self) -> list[Json]:
        """The entries before the first that is missing or damaged."""
        found: list[Json] = []
        if not self._entry(0).is_file():
            return found
        try:
            refuse_other_run(self.folder, _read(self.folder / "same.json"), self._same)
            while (path := self._entry(len(found))).is_file():
                entry = _read(path)
                if _digest(entry.get("value")) != entry.get("sha256"):
                    raise CheckpointError(f"{path} is damaged: its sha256 is not that of its value")
                found.append(entry["value"])
        except CheckpointError as damage:
            log.warning("round %d is done again: %s", len(found), damage)
        return found

    def _entry(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.json"


def _read(path: Path) -> dict[str, Json]:
    """A file's JSON object. Raises CheckpointError if it is none."""
    try:
        value = strict_json.loads(path.read_bytes())
    except (OSError, ValueError) as damage:
        raise CheckpointError(f"{path} is damaged ({type(damage).__name__})") from damage
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return value


def _digest(value: Json) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
