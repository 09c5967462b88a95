"""Budgets of measured time and of bytes at a context: how a recipe holds what they are measured by, and when it is
refused.

    cost: {latency: {...the table that `compresso latency` wrote...}}
    cost: {context: 4096, weight_bytes: 2, cache_bytes: 2}

The whole table stands in the recipe, so that a run is resumed, and run again, by the numbers it began with.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compresso.core import strict_json
from compresso.core.cost_table import Field
from compresso.core.latency_table import LatencyTable
from compresso.core.measures import NONE, Measures
from compresso.core.plain_values import whole_number
from compresso.errors import BudgetError, RecipeError
from compresso.metrics.record import Environment

MOST_BYTES = 16_000_000
"""Of a file with a table."""


def measures_of(told: Any, where: str) -> Measures:
    """What a raw recipe's `cost` says; nothing if it says none.

    Raises RecipeError, beginning with `where`.
    """
    if told is None:
        return NONE
    known = ("latency", "context", "weight_bytes", "cache_bytes")
    if not isinstance(told, dict) or not told or set(told) - set(known):
        raise RecipeError(f"{where}: wanted a mapping of {', '.join(known)}, as a run with such a budget writes it")
    given, numbers = told.get("context"), [told.get(name, 2) for name in known[2:]]
    context = whole_number(given)
    if given is not None and (context is None or context < 1):
        raise RecipeError(f"{where}: context {given!r}: wanted a whole number of tokens, at least 1")
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) or n <= 0 for n in numbers):
        raise RecipeError(f"{where}: bytes of a weight and of a cache entry are {numbers}; wanted numbers above 0")
    try:
        latency = None if told.get("latency") is None else LatencyTable.from_dict(told["latency"])
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    return Measures(latency, context, float(numbers[0]), float(numbers[1]))


def cost_knobs(measures: Measures) -> dict[str, Any]:
    """The inverse of `measures_of`."""
    latency = measures.latency
    told = {} if latency is None else {"latency": latency.to_dict()}
    if measures.context is not None:
        told |= {name: asdict(measures)[name] for name in ("context", "weight_bytes", "cache_bytes")}
    return told


def read_table(path: str | Path) -> LatencyTable:
    """The latency table in a file.

    Raises:
        BudgetError: there is none, or it is damaged.
    """
    file = Path(path).expanduser()
    cure = "`compresso latency --output` writes one"
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise BudgetError(f"--latency-table {path} is no file with a latency table; {cure}")
        told = strict_json.loads(file.read_bytes())
    except OSError as error:
        raise BudgetError(f"--latency-table {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BudgetError(f"--latency-table {path} is no latency table: {error}; {cure}") from error
    try:
        return LatencyTable.from_dict(told)
    except ValueError as error:  # it says what is wanted
        raise BudgetError(f"--latency-table {path}: {error}") from error


def machine_here(device: str = "cpu") -> dict[str, Field]:
    """The facts of this machine that a table is compared by. device: "cpu" or "cuda:0", the CPU's where there is none
    such.
    """
    there = not device.startswith("cuda") or torch.cuda.is_available()
    here = Environment.here(device if there else "cpu")
    return {"hardware": here.hardware, "device": here.device, "threads": here.threads, "system": here.system}


def refuse_other_table(measures: Measures, facts: Mapping[str, Field]) -> None:
    """Refuse a latency table of another model, machine or number of threads.

    Args:
        measures: of a run.
        facts: of the shapes of its model.

    Raises:
        BudgetError: with the field that differs.
    """
    table = measures.latency
    if table is None:
        return
    try:
        table.refuse_other("model", facts)
        table.refuse_other("machine", machine_here(str(table.machine.get("device", "cpu"))))
    except ValueError as error:
        raise BudgetError(f"{error}; measure this one with `compresso latency`") from error


def times(text: str | float) -> float:
    """How many times as fast: "1.5x", "1.5" or 1.5.

    Raises:
        BudgetError: if it is no number of at least 1.
    """
    try:
        value = float(str(text).strip().lower().removesuffix("x"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise BudgetError(
            f"--speedup {text}: how many times as fast as the dense model; wanted at least 1, such as 1.5x"
        )
    return value


def target_of(table: LatencyTable, dense: float, milliseconds: float | None, speedup: str | float | None) -> float:
    """The milliseconds wanted, from one of both ways to say it.

    Args:
        table: that tells them.
        dense: what the dense model takes by it.

    Raises:
        BudgetError: more than the dense model takes, or no positive number.
    """
    if speedup is not None:
        return dense / times(speedup)
    assert milliseconds is not None  # one of both is given
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise BudgetError(f"--milliseconds {milliseconds}: wanted a positive number of milliseconds a forward")
    if milliseconds > dense:
        raise BudgetError(
            f"--milliseconds {milliseconds:g}: the dense model takes {dense:.4g} ms already ({table.conditions.words});"
            " wanted no more than that"
        )
    return milliseconds
