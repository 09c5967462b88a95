"""What a person sees while a model trains: a live bar on a terminal, plain lines elsewhere, or nothing.

Lines are chosen where the output is no terminal, where NO_COLOR is set, and on dumb terminals. Only the main process
gets a display.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Style = Literal["auto", "bar", "lines", "silent"]


class Progress:
    """The display of a training run.

    Args:
        style: "auto" is a bar on a terminal, lines elsewhere.
        every: updates between lines.
        stream: where to; standard error by default, so that standard output stays clean.
    """

    def __init__(self, style: Style = "auto", every: int = 50, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        plain = not self._stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._style: Style = ("lines" if plain else "bar") if style == "auto" else style
        self._every = every
        self._bar: Bar | None = None

    @contextmanager
    def running(self, steps: int, done: int) -> Iterator[None]:
        """Show a run of `steps` updates of which `done` are behind it."""
        self._steps, self._done, self._first, self._tokens = steps, done, done, 0.0
        self._started = time.monotonic()
        if self._style != "bar":
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
            self._task = self._bar.add_task("", total=steps, completed=done, facts="")
            yield
        self._bar = None

    def step(self, done: int, phase: str, facts: Mapping[str, float], tokens: float) -> None:
        """Show that `done` updates are done.

        Args:
            done: updates done.
            phase: what the run is about now.
            facts: logged numbers; "loss", "sparsity" and "target" are shown.
            tokens: tokens of this update, over all processes.
        """
        self._tokens += tokens
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, description=phase, completed=done, facts=self._facts(facts))
        elif self._style == "lines" and (done % self._every == 0 or done == self._steps or done == self._first + 1):
            self.say(f"{phase}  {done}/{self._steps}  {self._facts(facts)}  {self._eta()}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._style == "lines":
            print(line, file=self._stream, flush=True)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _facts(self, facts: Mapping[str, float]) -> str:
        parts = [f"loss {facts['loss']:.4f}"] if "loss" in facts else []
        if "sparsity" in facts:
            parts.append(
                f"sparsity {facts['sparsity']:.4f}" + (f" of {facts['target']:.4f}" if "target" in facts else "")
            )
        parts.append(f"{self._tokens / self._seconds():,.0f} tokens/s")
        return "  ".join(parts)

    def _eta(self) -> str:
        left = (self._steps - self._done) * self._seconds() / max(self._done - self._first, 1)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
