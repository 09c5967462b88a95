"""Whether unfinished work is that of the run which wants to continue it: two identities, compared field by field."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compresso.errors import ResumeError


def differences(before: Mapping[str, Any], now: Mapping[str, Any], unknown: Collection[str] = ()) -> list[str]:
    """The fields in which two identities differ, as "name was 1, is 2".

    Args:
        before: as it was stored.
        now: JSON values, nested as you like; tuples count as lists.
        unknown: dotted names of what is not known now; they and all below them are passed over.
    """
    was, is_now = _flat(before), _flat(json.loads(json.dumps(now)))
    absent = "absent"
    return [
        f"{name} was {was.get(name, absent)!r}, is {is_now.get(name, absent)!r}"
        for name in sorted(was.keys() | is_now.keys())
        if was.get(name, absent) != is_now.get(name, absent)
        and not any(name == one or name.startswith(f"{one}.") for one in unknown)
    ]


def refuse_other_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: where it lies.
        found: the identity stored in it.
        wanted: the identity of this run.

    Raises:
        ResumeError: lists every differing field with both values.
    """
    if differing := differences(found, wanted):
        raise ResumeError(
            f"{path} belongs to another run: {'; '.join(differing)}. Restore these, or start afresh in another output"
            " folder"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as one mapping of dotted names."""
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {name: value} if name else {}
    flat: dict[str, Any] = {}
    for key, one in value.items():
        flat |= _flat(one, f"{name}.{key}" if name else str(key))
    return flat
