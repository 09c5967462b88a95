"""The program's streams, whatever they were started with: closed ones lead nowhere, and nothing is lost by a reader who
left or by a character that a terminal has not.
"""

import io
import os
import sys

from compresso.errors import without_escapes

_LONGEST = 400
"""Letters of a word that is shown whole: names come from anywhere."""


def hold_streams() -> None:
    """Open what was closed, on nothing.

    Else the next file that is opened would take the descriptor of an output, and get what is printed. Characters that
    an output's encoding has not are written as escapes.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115 - kept
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """One line on stderr, without orders to the terminal; where that takes nothing, the exit code says it alone."""
    try:
        words = (
            word if len(word) <= _LONGEST else f"{word[: _LONGEST // 2]}...{word[-80:]}"
            for word in without_escapes(text).split()
        )
        print(*words, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr.fileno())


def drop(descriptor: int) -> None:
    """Lead an output nowhere, so that the interpreter's last flush finds somebody who takes it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
