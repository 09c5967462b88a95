"""Knob groups: a stage is composed of them, recipes and `--set` name their knobs flat.

    stages: [gate_taylor: {keep: 0.5, batches: 8}]  ==  GateTaylor(keep=0.5, batches=8)
                                                    ==  GateTaylor(removes=Removes(0.5), calibrates=Calibrates(8))

A group given in part is the stage's default with the given knobs replaced. Nothing but this module knows both forms.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass
from pydantic_core import ArgsKwargs

KNOBS = ConfigDict(extra="forbid", allow_inf_nan=False, use_enum_values=False)
"""How knobs are validated: an unknown one, a NaN or a wrong type is an error."""

_T = TypeVar("_T")
_LAST: dict[type, frozenset[str]] = {}
"""Group -> those of its knobs that recipes show last."""


@dataclass(frozen=True)
class Knobs:
    """A mark on a stage's field: `removes: Annotated[Removes, Knobs(without=("layout",))] = Removes(layout="uniform")`.

    Args:
        without: knobs of the group that the stage does not have; they stay as in the field's default.
        after: a knob behind which recipes show the field's, where that is not the order of the fields.
    """

    without: tuple[str, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Knob:
    """A knob as recipes know it.

    Args:
        name: its key.
        field: the stage's field that is it, or the group that holds it.
        default: its value in a recipe that does not name it; `dataclasses.MISSING` where it must.
        group: the group's type; None for a knob of the stage's own.
    """

    name: str
    field: str
    default: Any
    group: type | None = None


@dataclass_transform(frozen_default=True)
def group(last: Sequence[str] = ()) -> Callable[[type[_T]], type[_T]]:
    """Make a class a knob group: frozen and validated. `last`: knobs that recipes show behind those of all other
    fields.
    """

    def made(cls: type[_T]) -> type[_T]:
        validated = validated_dataclass(cls, frozen=True, config=KNOBS)
        _LAST[validated] = frozenset(last)
        return validated  # type: ignore[return-value]

    return made


def with_flat_knobs(cls: type[_T]) -> type[_T]:
    """The class as a frozen, validated dataclass that takes its groups' knobs flat too. Raises ValueError for a group
    without a default, and for two knobs of one name.
    """

    def gathered(of: type, given: Any) -> Any:
        if isinstance(given, ArgsKwargs):
            return ArgsKwargs(given.args, _gathered(of, given.kwargs or {}))
        return _gathered(of, given) if isinstance(given, Mapping) else given

    cls.gathered = model_validator(mode="before")(classmethod(gathered))  # type: ignore[attr-defined]
    made: Any = validated_dataclass(cls, frozen=True, config=KNOBS)
    knobs_of(made)
    return made


@cache
def knobs_of(kind: type) -> tuple[Knob, ...]:
    """The knobs of a stage's type, in the order in which recipes show them. Raises as `with_flat_knobs`."""
    shown: list[Knob] = []
    at = 0
    for field in dataclasses.fields(kind):
        mark = _mark(field)
        default = _default(field)
        own = type(default) not in _LAST
        if own and _group(field) is not None:
            raise ValueError(f"{kind.__qualname__}.{field.name} is a knob group and needs a default")
        here = [Knob(field.name, field.name, default)] if own else _held(field.name, default, mark.without)
        last = frozenset[str]() if own else _LAST[type(default)]
        if mark.after:
            at = 1 + next(i for i, knob in enumerate(shown) if knob.name == mark.after)
        first = [knob for knob in here if knob.name not in last]
        shown[at:at] = first
        at += len(first)
        shown += [knob for knob in here if knob.name in last]
    names = [knob.name for knob in shown]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{kind.__qualname__} has the knob {twice[0]} twice; leave it out of a group: Knobs(without=)")
    return tuple(shown)


def dumped(stage: object) -> dict[str, Any]:
    """Every knob of a stage by its name in recipes, as JSON values."""
    whole = TypeAdapter(type(stage)).dump_python(stage, mode="json")
    return {
        knob.name: whole[knob.field] if knob.group is None else whole[knob.field][knob.name]
        for knob in knobs_of(type(stage))
    }


def groups_of(stage: object) -> dict[str, Any]:
    """A stage's knob groups, by their fields."""
    return {name: value for name, value in vars(stage).items() if type(value) in _LAST}


def without_field(kind: type, path: Sequence[int | str]) -> tuple[int | str, ...]:
    """The place of a validation error as recipes know it: without the group's field."""
    fields = {knob.field for knob in knobs_of(kind) if knob.group is not None}
    return tuple(path[1:]) if path and path[0] in fields else tuple(path)


def _gathered(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs in the fields that hold them, from any mixture of flat ones and groups."""
    held = {knob.name: knob.field for knob in knobs_of(kind) if knob.group is not None}
    found = {name: value for name, value in given.items() if name not in held}
    for field in dataclasses.fields(kind):
        default = _default(field)
        if type(default) not in _LAST:
            continue
        flat = {name: value for name, value in given.items() if held.get(name) == field.name}
        whole = found.get(field.name, {})
        if isinstance(whole, type(default)):
            whole = {knob.name: knob.default for knob in _held(field.name, whole, _mark(field).without)}
        if flat or (whole and isinstance(whole, Mapping)):
            values = {one.name: getattr(default, one.name) for one in dataclasses.fields(default)}
            found[field.name] = {**values, **whole, **flat}
    return found


def _held(field: str, group: Any, without: Sequence[str]) -> list[Knob]:
    """The knobs of a group's value."""
    kind: type = type(group)
    return [
        Knob(one.name, field, getattr(group, one.name), kind)
        for one in dataclasses.fields(kind)
        if one.name not in without
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _group(field: dataclasses.Field[Any]) -> type | None:
    """The knob group that a field is annotated with, if it is one."""
    kind = get_args(field.type)[0] if _mark(field) != Knobs() else field.type
    return kind if kind in _LAST else None


def _mark(field: dataclasses.Field[Any]) -> Knobs:
    return next((one for one in get_args(field.type)[1:] if isinstance(one, Knobs)), Knobs())
