"""JSON as a file of ours or of a model may hold it: finite numbers, keys that stand once, bounded depth.

Python's own reader takes `Infinity` and `NaN`, which are no JSON, keeps the last of two equal keys, and fails on a deep
nesting with an error that is no ValueError.
"""

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

MOST_DEPTH = 100
"""Objects and lists within each other."""
MOST_DIGITS = 300
"""Of a whole number."""
_DEEP = f"it is nested deeper than the {MOST_DEPTH} levels that are read"


_WORDS = {
    "Extra data": "another value begins",
    "Expecting value": "a value is missing",
    "Expecting ',' delimiter": "a comma or the closing bracket is missing",
    "Expecting ':' delimiter": "the colon behind a name is missing",
    "Expecting property name enclosed in double quotes": "a name in double quotes is missing",
    "Illegal trailing comma before end of object": "a comma stands before the closing bracket",
    "Illegal trailing comma before end of array": "a comma stands before the closing bracket",
    "Unterminated string starting at": "a string begins that does not end",
    "Invalid control character at": "a string holds a control character",
}


class Refused(ValueError):
    """What is written as JSON is, and holds what no file of ours or of a model may hold."""


def loads(text: str | bytes, unbounded: Collection[str] = ()) -> Any:
    """The value of a JSON text in UTF-8, without a byte order mark.

    Args:
        text: the text.
        unbounded: keys of whose values a number may be infinite.

    Raises:
        ValueError: it is none, or is nested too deeply; `Refused` where it holds NaN, Infinity or a number out of
            range, or a key twice in one object.

    >>> loads('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is no UTF-8") from error
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark; save it without")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError as error:
        raise ValueError(_DEEP) from error
    except json.JSONDecodeError as error:
        at = f" at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{words(error)}{at}" if text.strip() else "it is empty") from error
    _check(value, unbounded)
    return value


def words(error: json.JSONDecodeError) -> str:
    """What the parser found wrong, without its terms and the place."""
    return _WORDS.get(error.msg, error.msg[0].lower() + error.msg[1:])


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Refused(f"the number {digits[:20]}... has more than {MOST_DIGITS} digits")
    return int(digits)


def _check(value: Any, unbounded: Collection[str]) -> None:
    """Raise ValueError for numbers that are not finite, and for what is nested too deeply."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MOST_DEPTH + 1):
        inner: list[tuple[str, Any]] = []
        for key, one in level:
            if isinstance(one, dict):
                inner += one.items()  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            elif isinstance(one, list):
                inner += [(key, part) for part in one]  # pyright: ignore[reportUnknownVariableType]
            elif isinstance(one, float) and not math.isfinite(one) and not (key in unbounded and one == one):
                raise Refused(f"{key[:80] or 'it'} is {one}; a finite number is wanted")
        if not inner:
            return
        level = inner
    raise ValueError(_DEEP)
