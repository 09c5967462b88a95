"""How long a run and its stages have taken, over all pieces of a run that was interrupted and resumed.

The time spent so far lies in the work folder (`clock.json`) and is written again every few seconds: so a killed run
loses no more than that. Work that was lost with it and is done again took time, too, and is counted twice. What a
version that kept no such file spent before a resume is not known, and said to be so.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, FiniteFloat, ValidationError

from compresso.checkpoint.atomic import write_text
from compresso.errors import CompressoError
from compresso.metrics.record import Strict

log = logging.getLogger(__name__)

FILE = "clock.json"
BEAT = 5.0
"""Seconds between two writes."""


class Spent(Strict):
    """Seconds that earlier pieces took; `since_resume` where those before a resume are not known."""

    seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    since_resume: bool = False

    def after(self, seconds: float) -> "Spent":
        """With so many more, in seconds."""
        return Spent(seconds=self.seconds + max(seconds, 0.0), since_resume=self.since_resume)

    def facts(self, digits: int) -> dict[str, float | bool]:
        """What records say of it, rounded to so many digits."""
        return {"seconds": round(self.seconds, digits), **({"since_resume": True} if self.since_resume else {})}


class _Times(Strict):
    """What the file holds: the run, the stages that are not finished, and whether the next stage may have begun before
    the first piece that is known.
    """

    run: Spent = Spent()
    stages: dict[str, Spent] = Field(default_factory=dict[str, Spent])
    next_unknown: bool = False


class Clock:
    """Use as a context manager around a run; it writes until `stop`, or its end.

    Args:
        folder: the work folder; None for a process that owns none, which counts its own piece alone.
        started: when this piece began, in seconds since the epoch.
        resumed: whether there were pieces before.
    """

    def __init__(self, folder: Path | None, started: float, *, resumed: bool) -> None:
        self._path, self._started = None if folder is None else folder / FILE, started
        unknown = _Times(run=Spent(since_resume=True), next_unknown=True) if resumed else _Times()
        self._times = unknown if self._path is None or not resumed else _read(self._path, unknown)
        self._stage: tuple[str, float] | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="clock", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Write a last time; nothing is written after it."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write()

    def run(self) -> Spent:
        """What the run has taken so far, this piece included."""
        return self._times.run.after(time.time() - self._started)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Count the block's time as a stage's."""
        with self._lock:
            before = self._times.stages.get(label, Spent(since_resume=self._times.next_unknown))
            stages = {**self._times.stages, label: before}
            self._times = self._times.model_copy(update={"stages": stages, "next_unknown": False})
            self._stage = (label, time.time())
        self._write()
        try:
            yield
        finally:
            with self._lock:
                self._times, self._stage = self._now(), None
            self._write()

    def of(self, label: str) -> Spent:
        """What a stage has taken, all pieces together, once its block has ended."""
        return self._times.stages[label]

    def finished(self, label: str) -> None:
        """Forget a stage that is saved, with its time in its records: if its folder is damaged, it is done anew."""
        with self._lock:
            stages = {name: spent for name, spent in self._times.stages.items() if name != label}
            self._times = self._times.model_copy(update={"stages": stages})
        self._write()

    def _now(self) -> _Times:
        """The times with the stage that is under way."""
        if self._stage is None:
            return self._times
        label, begun = self._stage
        stages = {**self._times.stages, label: self._times.stages[label].after(time.time() - begun)}
        return self._times.model_copy(update={"stages": stages})

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._write()

    def _write(self) -> None:
        """Save the times; a disk that refuses is said, and no reason to end a run here."""
        if self._path is None:
            return
        with self._lock:
            times = self._now().model_copy(update={"run": self.run()})
            try:
                write_text(self._path, times.model_dump_json(indent=2) + "\n")
            except CompressoError as error:
                log.warning("the time spent so far is not saved, and a resumed run would not count it: %s", error)


def _read(path: Path, unknown: _Times) -> _Times:
    """What earlier pieces saved, or that it is not known."""
    if not path.is_file():
        return unknown
    try:
        return _Times.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        log.warning("%s is damaged: how long the run took before is not known", path)
        return unknown
