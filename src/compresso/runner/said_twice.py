"""An option and a `--set` that set the same: both were written, and one of them would win in silence."""

from collections.abc import Mapping, Sequence
from typing import Any

from compresso.errors import BudgetError, RecipeError
from compresso.runner.engine_shapes import parse_engine

_COUNTED = ("keep", "of")
_BUDGETS = {
    "keep": ("keep",),  # a share of whatever the recipe counts
    "parameters": _COUNTED,
    "macs": _COUNTED,
    "milliseconds": _COUNTED,
    "speedup": _COUNTED,
    "bytes-at-context": ("of",),
}
"""Option -> the knobs that it sets in every stage that has them."""


def refuse_said_twice(sets: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse an option beside a `--set` of what the option sets.

    Args:
        sets: "path=value" each.
        given: the options' names, without dashes, and their values; None is not given.

    Raises:
        BudgetError: both are a budget.
        RecipeError: both set another knob, or the data. Both are named.
    """
    for option, value in given.items():
        paths = () if value is None else _paths(option, value)
        for one in sets:
            parts = tuple(part.strip() for part in one.partition("=")[0].split("."))
            if parts[:1] == ("stages",) and len(parts) == 3:
                parts = ("stages", parts[2])
            if parts in paths:
                both = f"--{option} {value} and --set {one}"
                if option in _BUDGETS:
                    raise BudgetError(f"{both} are two budgets; give one")
                raise RecipeError(f"{both} both set {'data.source' if option == 'data' else parts[-1]}; give one")


def _paths(option: str, value: Any) -> tuple[tuple[str, ...], ...]:
    """What an option sets: ("stages", knob), of whichever stages have it, or ("data", "source")."""
    if option == "data":
        return (("data", "source"),)
    if option == "max-steps":
        return (("stages", "max_steps"),)
    if option in ("layout", "target"):  # an engine's multiples join a recipe's own, where equal widths replace them
        uniform = value == "uniform" if option == "layout" else parse_engine(str(value)).uniform
        return (("stages", "layout"),) if uniform else ()
    return tuple(("stages", knob) for knob in _BUDGETS.get(option, ()))
