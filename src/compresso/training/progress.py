"""What a person sees while something takes long: a live bar on a terminal, plain lines elsewhere, or nothing.

Lines are chosen where the output is no terminal, where NO_COLOR is set, and on dumb terminals. They come by the clock
and not by the work: the first and the last, and one every half minute between them, though nothing was finished since.
Only the main process gets a display.

What runs within something else that takes long shares its line, or takes its place where it has steps of its own: two
counters never take turns.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class _Frame:
    """Something that takes long: who shows it, what it is, and whether it has steps."""

    shown: "Progress"
    what: str
    steps: bool


_FRAMES: list[_Frame] = []
"""What takes long within what, the innermost last."""
_SPEAKING = threading.RLock()
"""Held while the frames change or a watch speaks."""


def _line() -> list[_Frame]:
    """The frames that share the line which is shown: the innermost, and where that has no steps all such around it."""
    at = len(_FRAMES) - 1
    while at > 0 and not _FRAMES[at].steps and not _FRAMES[at - 1].steps:
        at -= 1
    return _FRAMES[max(at, 0) :]


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
        self._said = 0.0
        self._of_step = ""

    @contextmanager
    def running(self, steps: int, done: int, phase: str = "", patience: float = 0.0) -> Iterator[None]:
        """Show a run of `steps` steps of which `done` are behind it; no line within `patience` seconds.

        phase: what it is about until the first step says so.
        """
        self._steps, self._done, self._first, self._tokens, self._part = steps, done, done, 0.0, 0.0
        self._started = self._warm = time.monotonic()
        self._line, self._said = f"{phase}  {done}/{steps}".strip(), self._started + max(patience - self._seconds, 0.0)
        self._silent_until = self._started + patience
        if self._style != "bar":
            with self._within(phase, steps=True) as frame, self._beating(frame, self._again, self._seconds):
                yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        with self._within(phase, steps=True), Bar(*columns, console=Console(file=self._stream)) as self._bar:
            self._task = self._bar.add_task(phase, total=steps, completed=done, facts="")
            yield
        self._bar = None

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show work that has no steps: a spinner, or lines once it takes long; `what` is in the form "reading X"."""
        if self._style != "bar":
            begun = time.monotonic()

            def beat() -> None:
                self.say(f"{': '.join(one.what for one in _line())}  {_clock(time.monotonic() - begun)}")

            self._said = begun + PATIENCE - self._seconds
            with self._within(what, steps=False) as frame, self._beating(frame, beat, self._seconds):
                yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        bar = Bar(*columns, console=Console(file=self._stream), transient=True)
        with self._within(what, steps=False), bar as self._bar:
            bar.add_task(": ".join(one.what for one in _line()), total=None)
            yield
        self._bar = None

    @contextmanager
    def _within(self, what: str, steps: bool) -> Iterator[_Frame]:
        """Count as the innermost of what takes long; a bar around it is taken away meanwhile."""
        frame, around = _Frame(self, what, steps), [one.shown._bar for one in _FRAMES[-1:]]
        for bar in filter(None, around):
            bar.stop()
        with _SPEAKING:
            _FRAMES.append(frame)
        try:
            yield frame
        finally:
            with _SPEAKING:
                _FRAMES.remove(frame)
            for bar in filter(None, around):
                bar.start()

    def step(self, done: int, phase: str, facts: Mapping[str, float], tokens: float) -> None:
        """Show that `done` steps are done.

        Args:
            done: steps done.
            phase: what the run is about now.
            facts: logged numbers; "loss", "sparsity" and "target" are shown.
            tokens: tokens of this step, over all processes; their rate is shown once there were any.
        """
        self._tokens += tokens
        self._done, self._part, self._of_step = done, 0.0, ""
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

    def part(self, done: int, parts: int, what: str) -> None:
        """Note how much of the step that goes on is done, which is shown where a step takes long.

        Args:
            done, parts: so many of the equal parts of the step.
            what: they are, in the plural.
        """
        self._part, self._of_step = done / parts, f"{done} of {parts} {what}" if parts > 1 else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + self._part)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._said = now = time.monotonic()
        for frame in tuple(_FRAMES):
            frame.shown._said = max(frame.shown._said, now)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._style == "lines":
            print(line, file=self._stream, flush=True)

    def _again(self) -> None:
        """The state once more, for a step that takes long."""
        since = time.monotonic() - self._started
        behind = self._done - self._first + self._part
        left = since * (self._steps - self._first - behind) / behind if self._part else 0.0
        told = [self._line, *([self._of_step] if self._of_step else []), f"working for {_clock(since)}"]
        self.say(", ".join(told) + (f"  {_clock(left)} left" if left else ""))

    @contextmanager
    def _beating(self, frame: _Frame, beat: Callable[[], None], seconds: float) -> Iterator[None]:
        """Call `beat` whenever nothing was said for so long and the line is the frame's; only where lines are shown."""
        if self._style != "lines" or not seconds:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(max(self._said + seconds - time.monotonic(), 0.01)):
                with _SPEAKING:
                    if time.monotonic() - self._said >= seconds and frame in _line()[:1]:
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
