"""Every error that compresso raises on purpose, and the exit code the command line gives it.

    CompressoError                 exit 2: bad input, with the cure in the message
      ArgumentError                a public function was called with an argument of the wrong type, or an unknown one
      RecipeError                  unknown recipe, stage or key; stages in an illegal order
      ArchError                    an architecture nobody described, or a model that is not what its config says
      BudgetError                  a budget that cannot be met
      DataError                    empty, malformed or unknown data
      CheckpointError              a checkpoint that is missing, truncated, foreign or unsafe to read
      ExportError                  a shape that the asked layout cannot hold, or a written file that reads back
                                   differently
      ResumeError                  a resume that would not continue the same run
      ResourceError                exit 3: not enough disk, memory or device
      NumericError                 exit 4: NaN or Inf where a number was needed
        CollapseError              a pruned model that writes and predicts no better than chance, so it is not written

`Interrupted` is none of them: a run that a signal stopped ends the process with 130 or 143.
Messages are one line: what, the value, what was wanted, the cure.
"""

import difflib
import re
import signal
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compresso.core.budget import Refused, Shortfall

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\-~])|[\x00-\x08\x0e-\x1b\x7f-\x9f]"
)
"""What a terminal takes as an order: sequences that begin with an escape, and control characters that are no white
space.
"""
GONE_IN = "0.3"
"""The release in which the names that this one deprecates stop working."""


class CompressoError(Exception):
    """Base of all errors that carry a message meant for a person; `exit_code` is what the command line returns."""

    exit_code = 2


class ArgumentError(CompressoError):
    """An argument of a public function that is missing, unknown or of the wrong type."""


class RecipeError(CompressoError):
    """A recipe names something that does not exist, or orders its stages illegally."""


class ArchError(CompressoError):
    """No description exists for this architecture, or the model contradicts its config."""


class BudgetError(CompressoError):
    """A budget outside its range, or one that the floors make impossible; by how much, and in which stage, where that
    is known.
    """

    def __init__(self, message: str, shortfall: "Shortfall | None" = None, refused: "Refused | None" = None) -> None:
        super().__init__(message)
        self.shortfall = shortfall
        self.refused = refused


class DataError(CompressoError):
    """Data that is unknown, empty or malformed; names the file and the line."""


class CheckpointError(CompressoError):
    """A checkpoint that cannot be read, or must not be."""


class ExportError(CompressoError):
    """A shape the layout cannot hold, or a file that does not read back as it was written."""


class ResumeError(CompressoError):
    """A resume whose recipe, model, data or version differ from the interrupted run."""


class ResourceError(CompressoError):
    """Not enough disk, memory or device."""

    exit_code = 3


class NumericError(CompressoError):
    """NaN or Inf where a number was needed."""

    exit_code = 4


class CollapseError(NumericError):
    """A pruned model whose quality collapsed; written only when somebody insists."""


class Interrupted(SystemExit):
    """A run stopped by a signal after it saved its state.

    Uncaught, it ends the process with the usual exit code (130 or 143) and no traceback. It is a SystemExit and not a
    CompressoError, so that code which reports errors and goes on does not swallow it.
    """

    def __init__(self, number: signal.Signals, saved: str | None) -> None:
        super().__init__(128 + number)
        self.signal = number
        self.saved = saved

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is sent to another process."""
        return type(self), (self.signal, self.saved)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}; " + (
            f"continue from {self.saved}" if self.saved else "nothing was saved"
        )


_ALIKE, _FAINTLY = 0.6, 0.5
"""How alike a name is that is proposed, from 0 to 1 as difflib measures it, and one that begins alike: at 0.5, nope
would be evopress, and ggml is to be gguf.
"""


def alike(name: str, valid: Iterable[str]) -> str | None:
    """The closest valid name; None where none is near.

    >>> alike("ggml", ["gguf", "onnx"]), alike("nope", ["moe", "evopress"])
    ('gguf', None)
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)
    same = [one for one in names if one[:1] == name[:1]]
    return next(iter(near or difflib.get_close_matches(name, same, n=1, cutoff=_FAINTLY)), None)


def nearest(name: str, valid: Iterable[str], shown: Iterable[str] | None = None) -> str:
    """The tail of a message about an unknown name: the closest valid one, or all of them, or those `shown` in their
    place.

    >>> nearest("head", ["heads", "channels"])
    "did you mean 'heads'?"
    >>> nearest("nope", ["moe", "evopress"])
    'known: evopress, moe'
    >>> nearest("tflite", ["gguf", "onnx", "sliced"])
    'known: gguf, onnx, sliced'
    """
    names = sorted(valid)
    close = alike(name, names)
    return f"did you mean '{close}'?" if close else f"known: {', '.join(names if shown is None else sorted(shown))}"


def without_escapes(text: str) -> str:
    """A text without colours, cursor moves and other orders to a terminal.

    >>> without_escapes("\x1b[96mThis is step 1/3\x1b[0m of it")
    'This is step 1/3 of it'
    """
    return _ESCAPES.sub("", text)


def quoted(text: object, most: int = 300, *, last: bool = False) -> str:
    """What another library or program said, on one line of plain letters: its first `most` of them, or its last.

    >>> quoted(ValueError("first\\n  \x1b[31msecond\x1b[0m"))
    'first second'
    """
    line = " ".join(without_escapes(str(text)).split())
    return line[-most:] if last else line[:most]


def first_line(error: BaseException) -> str:
    """The first line of what another library says, `quoted`; its error's name if it says nothing."""
    return quoted((str(error).splitlines() or [""])[0]) or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device."""
    torch: Any = sys.modules.get("torch")  # where it was not imported, no tensor was made
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in said)


def deprecated(old: str, new: str) -> None:
    """Warn the caller of our caller that the argument `old` works for one release more, and `new` takes its place."""
    warnings.warn(
        f"{old} is deprecated and goes with compresso {GONE_IN}; give {new}", DeprecationWarning, stacklevel=3
    )
