"""The door of the public functions: arguments of the right type come in, and errors go out in the words of the
interface in use.
"""

import errno
import functools
import inspect
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from compresso.errors import ArgumentError, CompressoError, nearest
from compresso.wording import meant, named, worded

P = ParamSpec("P")
R = TypeVar("R")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 70
_SHORT.maxlevel = 2
_MAY_NAME_FILES = ("corpus",)
"""Names of data, or files."""
_WORDS: dict[object, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    type(None): "None",
    Path: "a path",
}


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are held to its annotations before it is entered.

    It gets what it is called with; only whole numbers of other packages become Python's. ArgumentError, naming the
    argument, is raised for one of another type, one that is missing or unknown, and for an empty path.
    """

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = _accepted(function, args, kwargs)
            return function(*given.args, **given.kwargs)
        except CompressoError as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (worded(error.args[0], inspect.signature(function).parameters),)
            raise

    return entered


def _accepted(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call, each of its type. Raises ArgumentError."""
    signature = inspect.signature(function)
    name = getattr(function, "__name__", "the function")
    for unknown in sorted(kwargs.keys() - signature.parameters.keys()):
        ours = meant(unknown, signature.parameters)
        cure = nearest(unknown, signature.parameters) if ours is None else f"give {ours}="
        raise ArgumentError(f"{name} has no argument '{unknown}'; {cure}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        wanted = ", ".join(one.name for one in signature.parameters.values() if one.default is one.empty)
        raise ArgumentError(f"{name}: {error}; wanted at least {wanted}") from error
    for one, value in bound.arguments.items():
        bound.arguments[one] = _checked(name, one, value, _hints(function)[one])
    return bound


def _checked(verb: str, name: str, value: Any, wanted: Any) -> Any:
    """An argument of the wanted type. Raises ArgumentError naming it."""
    from pydantic import ValidationError  # not needed by help

    if isinstance(value, Integral) and not isinstance(value, int):
        value = operator.index(value)
    given = f"{named(verb, name)}{_shown(value)}"
    paths = _inner(wanted) if isinstance(value, list | tuple) else _kinds(wanted)
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, str | Path) and (Path in paths or name in _MAY_NAME_FILES):
            _refuse_impossible(given, str(one), name == "data")
    if isinstance(value, str) and _inner(wanted) and str not in _kinds(wanted):  # it would be read letter by letter
        cure = f"; give {name}=[{_SHORT.repr(value)}]" if str in _inner(wanted) else ""
        raise ArgumentError(f"{given}: wanted {_words(wanted)}{cure}")
    try:
        _adapter(wanted).validate_python(value)
    except ValidationError as error:
        words = [one for kind in _kinds(wanted) if typing.get_origin(kind) is Literal for one in typing.get_args(kind)]
        if isinstance(value, str) and words:
            raise ArgumentError(f"{given} is unknown; {nearest(value, words)}") from error
        raise ArgumentError(f"{given}: wanted {_words(wanted)}, got {_got(value)}") from error
    return value


def _refuse_impossible(given: str, text: str, several: bool) -> None:
    """Raise ArgumentError for a text that is no path on any machine, or leads nowhere, of which each use would fail in
    its own way. What merely does not exist passes: it may be a name.
    """
    if not text.strip():
        raise ArgumentError(f"{given} is empty; wanted a path or a name")
    if "\0" in text:
        raise ArgumentError(f"{given} holds a NUL, which no path or name does")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentError(f"{given} is not UTF-8, as names of files are here; rename it") from None
    for part in text.split(",") if several else [text]:  # several sources may be longer than one path
        try:
            Path(part).expanduser().stat()
        except RuntimeError as error:
            raise ArgumentError(f"{given}: there is no such home folder; write the path out") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ArgumentError(f"{given} is {len(part)} letters long, too long for a path or name") from error
            if error.errno == errno.ELOOP:
                raise ArgumentError(f"{given} is a link that leads back to itself; give the real path") from error


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


@functools.cache
def _adapter(wanted: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(wanted, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _kinds(wanted: Any) -> tuple[Any, ...]:
    """The alternatives of a type."""
    return typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)


def _inner(wanted: Any) -> tuple[Any, ...]:
    """The alternatives of what a list holds; none of what is no list."""
    lists = [kind for kind in _kinds(wanted) if typing.get_origin(kind) is Sequence]
    return _kinds(typing.get_args(lists[0])[0]) if lists else ()


def _words(wanted: Any) -> str:
    """A type as a sentence names it.

    >>> _words(Sequence[str | Path] | None)
    'a list, each a string or a path or None'
    """
    words = [_word(kind) for kind in _kinds(wanted)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _word(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Sequence:
        inner = _words(typing.get_args(kind)[0])
        return f"a list of {inner.removeprefix('a ')}s" if " or " not in inner else f"a list, each {inner}"
    if origin is Mapping:
        return "a mapping of strings"
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if kind in _WORDS or origin is not None:
        return _WORDS.get(kind, str(kind))
    return f"a {kind.__module__.partition('.')[0]}.{kind.__name__}"


def _shown(value: Any) -> str:
    """A value as a message shows it, in one short line."""
    plain = value is None or isinstance(value, str | bytes | bool | int | float | list | tuple | dict | Path)
    value = str(value) if isinstance(value, Path) else value
    return " ".join(_SHORT.repr(value).split()) if plain else f"<{type(value).__name__}>"


def _got(value: Any) -> str:
    """The type of a value, and of what it holds."""
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return "None" if value is None else type(value).__name__
