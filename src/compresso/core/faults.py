"""What a validator found wrong with a value, in our words: what was wanted, and how to write it.

A validator's own sentence ("Input should be a valid number, unable to parse string as a number") names the parser. Here
are the kinds of faults that a person meets; a sentence of one of our own checks stays as it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compresso.core.counted import counted

Fault = Mapping[str, Any]
"""As pydantic gives one: `type`, `msg`, and, where there are any, `ctx` and `input`."""

_KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a text",
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "dataclass_type"), "a mapping"),
}
_BOUNDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "greater_than": lambda ctx: f"more than {ctx['gt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "less_than": lambda ctx: f"less than {ctx['lt']:g}",
    "too_short": lambda ctx: f"at least {counted(ctx['min_length'], 'value')}",
    "too_long": lambda ctx: f"at most {counted(ctx['max_length'], 'value')}",
    "literal_error": lambda ctx: str(ctx["expected"]),
    "enum": lambda ctx: str(ctx["expected"]),
}
_SHARE = re.compile(r"\s*(\d+(?:[.,]\d+)?)\s*%\s*")
_COMMA = re.compile(r"\s*(-?\d+),(\d+)\s*")


def said(faults: Sequence[Fault]) -> str:
    """What is wrong with one value.

    Args:
        faults: of a value that may be one of several things, a fault for each.

    >>> said([{"type": "float_parsing", "msg": "Input should be a valid number", "input": "70%"}])
    'wanted a number; write 0.7'
    >>> said([{"type": "greater_than_equal", "msg": "", "ctx": {"ge": 0}}, {"type": "string_type", "msg": ""}])
    'wanted at least 0 or a text'
    >>> said([{"type": "value_error", "msg": "Value error, batch=6 cannot be split"}])
    'batch=6 cannot be split'
    >>> said([{"type": "missing", "msg": "Field required", "loc": ("layers", 1)}])
    'wanted 2 values'
    """
    first = faults[0]
    if first["type"] == "missing" and (loc := first.get("loc")) and isinstance(loc[-1], int):
        return f"wanted {counted(max(fault['loc'][-1] for fault in faults) + 1, 'value')}"  # of a list
    wanted = [_wanted(fault) for fault in faults]
    if None in wanted:
        return "is missing" if first["type"] == "missing" else str(first["msg"]).removeprefix("Value error, ")
    return f"wanted {' or '.join(dict.fromkeys(filter(None, wanted)))}{_rewritten(first)}"


def _wanted(fault: Fault) -> str | None:
    """What a value should have been; None where a check of our own, or one that is not known here, says it."""
    kind = str(fault["type"])
    return _BOUNDS[kind](fault["ctx"]) if kind in _BOUNDS else _KINDS.get(kind)


def _rewritten(fault: Fault) -> str:
    """How a number is written that was given as a percentage or with a decimal comma; "" for anything else."""
    given = fault.get("input")
    if fault["type"] != "float_parsing" or not isinstance(given, str):
        return ""
    if share := _SHARE.fullmatch(given):
        return f"; write {float(share[1].replace(',', '.')) / 100:g}"
    if comma := _COMMA.fullmatch(given):
        return f"; write {comma[1]}.{comma[2]}"
    return ""
