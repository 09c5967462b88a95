"""What a person sees while something takes long: a live bar on a terminal, plain lines elsewhere, or nothing.

Lines are chosen where the output is no terminal, where NO_COLOR is set, and on dumb terminals. They come by the clock
and not by the work: the first and the last, and one every half minute between them, though nothing was finished since.
Only the main process gets a display.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

Style = Literal["auto", "bar", "lines", "silent"]
PATIENCE = 10.0
"""Seconds before work of unknown length is mentioned."""


class Progress:
    """The display of something that takes long.

    Args:
        style: "auto" is a bar on a terminal, lines elsewhere.
        seconds: most seconds between lines; 0 for a line at each step, and at no other time.
        stream: where to; standard error by default, so that standard output stays clean.
    """

    def __init__(self, style: Style = "auto", seconds: float = 30.0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        plain = not self._stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._style: Style = ("lines" if plain else "bar") if style == "auto" else style
        self._seconds = seconds
        self._bar: Bar | None = None

    @contextmanager
    def running(self, steps: int, done: int, phase: str = "", patience: float = 0.0) -> Iterator[None]:
        """Show a run of `steps` steps of which `done` are behind it; no line within `patience` seconds.

        phase: what it is about until the first step says so.
        """
        self._steps, self._done, self._first, self._tokens = steps, done, done, 0.0
        self._started = self._warm = time.monotonic()
        self._line, self._said = f"{phase}  {done}/{steps}".strip(), self._started + max(patience - self._seconds, 0.0)
        self._silent_until = self._started + patience
        if self._style != "bar":
            with self._beating(self._again, self._seconds):
                yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=Console(file=self._stream)) as self._bar:
            self._task = self._bar.add_task(phase, total=steps, completed=done, facts="")
            yield
        self._bar = None

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show work that has no steps: a spinner, or lines once it takes long; `what` is in the form "reading X"."""
        if self._style != "bar":
            begun = time.monotonic()
            self._said = begun + PATIENCE - self._seconds
            with self._beating(lambda: self.say(f"{what}  {_clock(time.monotonic() - begun)}"), self._seconds):
                yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=Console(file=self._stream), transient=True) as self._bar:
            self._bar.add_task(what, total=None)
            yield
        self._bar = None

    def step(self, done: int, phase: str, facts: Mapping[str, float], tokens: float) -> None:
        """Show that `done` steps are done.

        Args:
            done: steps done.
            phase: what the run is about now.
            facts: logged numbers; "loss", "sparsity" and "target" are shown.
            tokens: tokens of this step, over all processes; their rate is shown once there were any.
        """
        self._tokens += tokens
        self._done = done
        if done == self._first + 1:
            self._warm = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=phase, completed=done, facts=self._facts(facts))
        elif self._style == "lines":
            self._line = "  ".join(part for part in (phase, f"{done}/{self._steps}", self._facts(facts)) if part)
            now = time.monotonic()
            due = now - self._said >= 0.8 * self._seconds or done in (self._first + 1, self._steps)
            if due and now >= self._silent_until:
                self.say(f"{self._line}{self._eta()}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._style == "lines":
            print(line, file=self._stream, flush=True)

    def _again(self) -> None:
        """The state once more, for a step that takes long."""
        self.say(f"{self._line}, working for {_clock(time.monotonic() - self._started)}")

    @contextmanager
    def _beating(self, beat: Callable[[], None], seconds: float) -> Iterator[None]:
        """Call `beat` whenever nothing was said for so long; only where lines are shown."""
        if self._style != "lines" or not seconds:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(max(self._said + seconds - time.monotonic(), 0.01)):
                if time.monotonic() - self._said >= seconds:
                    beat()

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _facts(self, facts: Mapping[str, float]) -> str:
        parts = [f"loss {facts['loss']:.4f}"] if "loss" in facts else []
        if "sparsity" in facts:
            parts.append(
                f"sparsity {facts['sparsity']:.4f}" + (f" of {facts['target']:.4f}" if "target" in facts else "")
            )
        if self._tokens:
            parts.append(f"{self._tokens / max(time.monotonic() - self._started, 1e-9):,.0f} tokens/s")
        return "  ".join(parts)

    def _eta(self) -> str:
        """The time that is left, by the pace since the first step, which warms up; "" before there is one."""
        steps = self._done - self._first - 1
        if self._done == self._steps:
            return f"  in {_clock(time.monotonic() - self._started)}"
        return (
            f"  {_clock((self._steps - self._done) * (time.monotonic() - self._warm) / steps)} left"
            if steps > 0
            else ""
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
