"""Command-line budgets and overrides, written into a recipe before it is checked."""

import math
from pathlib import Path
from typing import Any

import yaml

from compresso.errors import BudgetError, RecipeError
from compresso.inspection import inspect
from compresso.recipe import override, read, with_knob

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


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
        raise BudgetError(f"--parameters {text!r}: wanted a positive number with an optional K, M, B or T, such as 5.4B")
    return value


def with_options(
    recipe: str | Path,
    *,
    model: str,
    keep: float | None = None,
    parameters: str | None = None,
    speedup: float | None = None,
    layout: str = "auto",
    max_steps: int | None = None,
    sets: list[str] | tuple[str, ...] = (),
) -> dict[str, Any]:
    """The raw recipe with budget, layout, step cap and `path=value` overrides in it.

    Raises:
        BudgetError: more than one budget, or one outside its range.
        RecipeError: an unknown recipe, or an override that fits nothing.
    """
    raw = read(recipe)
    for one in sets:
        path, equals, value = one.partition("=")
        if not equals:
            raise RecipeError(f"--set {one}: wanted path=value, such as stages.learn_gates.mask_lr=0.02")
        raw = override(raw, path.strip(), yaml.safe_load(value))
    given = [name for name, value in (("--keep", keep), ("--parameters", parameters), ("--speedup", speedup)) if value is not None]
    if len(given) > 1:
        raise BudgetError(f"{' and '.join(given)} are two budgets; give one")
    if keep is not None:
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise BudgetError(f"--keep {keep}: the kept share of block parameters lies in (0, 1]; 0.7 removes 30 %")
        raw = with_knob(raw, "keep", keep)
    elif parameters is not None:
        total = inspect(model)["parameters"]["total"]
        share = count(parameters) / total
        if share > 1:
            raise BudgetError(f"--parameters {parameters}: the model has {total:,}; wanted fewer")
        raw = with_knob(with_knob(raw, "keep", share), "of", "total")
    elif speedup is not None:
        if not (math.isfinite(speedup) and speedup >= 1):
            raise BudgetError(f"--speedup {speedup}: wanted a factor of at least 1, such as 1.5")
        raw = with_knob(with_knob(raw, "keep", 1 / speedup), "of", "macs")
    if layout not in ("auto", "uniform", "padded", "native"):
        raise RecipeError(f"--layout {layout!r}: wanted uniform, padded, native or auto")
    if layout == "uniform":
        raw = with_knob(raw, "layout", "uniform")
    if max_steps is not None:
        raw = with_knob(raw, "max_steps", max_steps)
    return raw
