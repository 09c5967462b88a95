"""The command line: parse, call, print. Everything it does can be done from Python with the functions it calls.

Exit codes: 0 ok, 2 bad input, 3 not enough resource, 4 numeric failure, 130/143 interrupted. Errors are one line on
stderr; an exception that nobody foresaw keeps its traceback, and exits with 1. Nothing heavy is imported before a
command runs, so that help costs no more than its text.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from typer.exceptions import TyperException

from compresso.cli import making, results  # noqa: F401 - each registers its commands
from compresso.cli.app import app
from compresso.cli.streams import drop, hold_streams, say
from compresso.core.faults import said
from compresso.errors import ArgumentError, CompressoError, Interrupted, out_of_memory
from compresso.wording import command_line, meant

__all__ = ["app", "main"]

_NO_RESOURCE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command (of `sys.argv` if none is given), turn errors into one line, and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    hold_streams()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it when it is imported
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        _refuse_empty(arguments)
        with command_line():
            code = app(arguments or ["--help"], prog_name="compresso", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what typer makes of a KeyboardInterrupt
            say("interrupted")
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as stop:
        cure = "; repeat the command with --resume to go on" if stop.saved else ""
        say(f"stopped by {stop.signal.name}{cure}")
        raise
    except SystemExit as leaving:  # typer's own answer to a pipe whose reader has left: 1, and nothing said
        if isinstance(leaving.__context__, BrokenPipeError):
            sys.exit(0)
        raise
    except Exception as error:
        message, code = _explained(error)
        if message:
            say(message)
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ArgumentError for an argument without a text: as a path it would be the folder that the process stands
    in.
    """
    before = "the command"
    for one in arguments:
        name, equals, value = one.partition("=")
        if not one or (name.startswith("--") and equals and not value):
            raise ArgumentError(f"{name or before} is given an empty text; give a value, or leave it out")
        before = one


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM outside of training: end by an exception, so that half-written folders are removed on the way out."""
    raise Interrupted(signal.Signals(number), None)


def _explained(error: Exception) -> tuple[str, int]:
    """Message and exit code of a foreseen exception; others are raised again."""
    if isinstance(error, CompressoError):
        return f"{type(error).__name__}: {error}", error.exit_code
    if isinstance(error, TyperException):
        return f"usage: {_said(error)} See `{_help_of(error)}`", 2
    if out_of_memory(error):
        return (
            f"ResourceError: out of memory ({error}); lower micro_batch, or set checkpointing: true or precision: bf16",
            3,
        )
    if isinstance(
        error, BrokenPipeError
    ):  # whoever read our output has left: nothing is wrong, and nothing more can be said to them
        drop(sys.stdout.fileno())
        return "", 0
    if isinstance(error, OSError):
        return _of_the_system(error)
    raise error


def _said(error: TyperException) -> str:
    """What was typed wrongly, as a sentence."""
    from pydantic import ValidationError  # not needed by help

    cause = error.__cause__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        given = "" if first["type"] == "value_error" else f"{str(first['input'])!r}: "
        error.message = f"{given}{said([first])}"
    words = error.format_message()
    given, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if isinstance(given, str) and context is not None:
        known = [option for one in context.command.params for option in one.opts]
        if given not in known and (option := meant(given, known)) is not None:
            words = f"{error.message}; give {option}"
    return words if words.endswith((".", "?")) else f"{words}."


def _of_the_system(error: OSError) -> tuple[str, int]:
    """Message and exit code of an error of the operating system that no room put into its own words."""
    if isinstance(error, FileNotFoundError) and not _stands_somewhere():
        return "CheckpointError: the working folder is gone; change to one that exists", 2
    where = f"{error.filename}: " if error.filename is not None else ""
    why = error.strerror or str(error) or "an input or output error without a reason"
    if error.errno in _NO_RESOURCE:
        return f"ResourceError: {error}; free some space, or choose another output", 3
    if error.errno is None:
        return f"ResourceError: {where}{why} ({type(error).__name__}); free some space, or choose another output", 3
    return f"CheckpointError: {where}{why}; check the path and its permissions", 2


def _stands_somewhere() -> bool:
    """Whether the working folder exists."""
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _help_of(error: TyperException) -> str:
    """The help page of the command that was called wrongly."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'compresso'} --help"
