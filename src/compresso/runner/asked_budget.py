"""A budget that cannot be met, said in the option and the unit that it was asked for in, with one that can.

A recipe holds every budget as `keep`, a share of what it counts. Whoever asked for parameters, multiply-accumulates or
time gave no such share. More than one thing may hold their budget up, and the second is seen only past the first: a
floor that grows with the share, a later stage that trains what would be gone. So larger budgets are tried until nothing
speaks against one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from compresso.core.budget import Shortfall
from compresso.errors import BudgetError, CompressoError
from compresso.runner.budget_cures import cured, shortfall_of
from compresso.runner.measured_budget import times

TRIES = 8
"""Budgets that are tried at most; each is past what held the one before up."""
DIGITS = 4
"""Significant ones of a budget that is proposed."""
_GROW, _FALL = ("parameters", "milliseconds"), ("macs", "speedup")
"""Options that grow with the share that stays, and those that fall with it."""
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_OF_KEEP = re.compile(r"\bkeep=|\b[Rr]aise keep\b|--keep\b")


def count(text: str) -> float:
    """A number of parameters: "5.4B", "300M", "6738415616".

    >>> count("5.4B")
    5400000000.0

    Raises:
        BudgetError: if it is not a positive number with an optional K, M, B or T.
    """
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        value = float(text[: len(text) - len(unit)]) * _UNITS[unit]
    except (ValueError, KeyError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise BudgetError(
            f"--parameters {text!r}: wanted a positive number with an optional K, M, B or T, such as 5.4B"
        )
    return value


@dataclass(frozen=True)
class Asked:
    """A budget as it was given.

    Args:
        name: parameters, macs, milliseconds or speedup.
        value: as it was written.
    """

    name: str
    value: str

    def __str__(self) -> str:
        """As it stands on the command line."""
        return f"--{self.name} {self.value}"

    @property
    def grows(self) -> bool:
        """Whether more of it keeps more of the model."""
        return self.name in _GROW

    @property
    def argument(self) -> str | float:
        """As `run` takes it."""
        return self.value if self.name in ("parameters", "speedup") else float(self.value)

    def of_share(self, factor: float) -> "Asked":
        """The same for so many times the share, rounded to the side on which more stays.

        >>> str(Asked("parameters", "20M").of_share(1.8588384)), str(Asked("speedup", "3x").of_share(2))
        ('--parameters 37.18M', '--speedup 1.5x')
        """
        if self.name == "parameters":
            return replace(self, value=_with_unit(count(self.value) * factor))
        given = times(self.value) if self.name == "speedup" else float(self.value)
        found = f"{_rounded(given * factor if self.grows else given / factor, up=self.grows):.10g}"
        return replace(self, value=found + ("x" if self.name == "speedup" else ""))


def asked_for(given: Mapping[str, Any]) -> Asked | None:
    """The budget among a run's options; None where none or more than one was given, or a share."""
    there = [name for name in ("keep", *_GROW, *_FALL) if given.get(name) is not None]
    if len(there) != 1 or there[0] == "keep":
        return None
    value = given[there[0]]
    if "," in str(value):  # several targets, of which the last is refused in words of its own
        return None
    return Asked(there[0], f"{value:.10g}" if isinstance(value, int | float) else str(value))


@contextmanager
def said_as_asked(given: Mapping[str, Any], again: Callable[[Mapping[str, Any]], object]) -> Iterator[None]:
    """While the block runs, a budget out of reach is refused in the words of the option that asked for it.

    Args:
        given: the options of a run, by the names of its arguments.
        again: checks the run's shapes under other options, as the block does. Raises CompressoError.

    Raises:
        BudgetError: naming the option, all that holds it up, and a value that `again` takes.
    """
    try:
        yield
    except BudgetError as error:
        asked, found = asked_for(given), shortfall_of(error)
        if not any(given.get(name) is not None for name in (*_GROW, *_FALL)) or (found is None and error.refused):
            raise cured(error, given, again) from error
        if asked is None or (found is None and not _OF_KEEP.search(str(error))):
            raise
        if found is None:
            cure = "more" if asked.grows else "less"
            raise BudgetError(f"{error} (keep is the share that {asked} comes to: give {cure} than that)") from error
        raise BudgetError(_refusal(asked, found, given, again)) from error


def _refusal(
    asked: Asked, found: Shortfall | None, given: Mapping[str, Any], again: Callable[[Mapping[str, Any]], object]
) -> str:
    """What is said, once a budget was found that nothing speaks against or there is none to try."""
    causes: list[str] = []
    tried = asked
    for _ in range(TRIES):
        if found is None:
            break
        causes += [found.cause] if found.cause not in causes else []
        tried = tried.of_share(found.share / found.keep)
        try:
            again({**given, tried.name: tried.argument})
        except CompressoError as error:
            found = shortfall_of(error)
            continue
        side = "below the floor" if asked.grows else "above the most"
        cure = f"give {tried} or {'more' if asked.grows else 'less'}"
        return f"{asked} is {side} of {tried.value} ({'; '.join(causes)}); {cure}"
    return f"{asked} is out of reach: {'; '.join(causes)}"


def _rounded(amount: float, up: bool) -> float:
    """An amount to so many significant digits, rounded up or down."""
    step = 10.0 ** (math.floor(math.log10(amount)) + 1 - DIGITS)
    return (math.ceil(amount / step - 1e-9) if up else math.floor(amount / step + 1e-9)) * step


def _with_unit(amount: float) -> str:
    """A number of parameters, rounded up, with its unit."""
    unit, size = max((one for one in _UNITS.items() if one[1] <= max(amount, 1)), key=lambda one: one[1])
    return f"{_rounded(amount / size, up=True):.10g}{unit}"
