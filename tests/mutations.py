"""Seeded damage to JSON and YAML files: what hands, other programs and broken disks make of them."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "../x",
    0,
    -1,
    1,
    3,
    10**30,
    2**63,
    -(2**31),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    [None],
    ["x"],
    [[]],
    {},
    {"x": None},
    {"x": {"x": "x"}},
    "x" * 5000,
    "\x00",
    "\ud83d\ude00\x1b[31m",
)
"""What takes the place of a value."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested objects, and the first few of a long list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, one in list(inner)[:200]:
        yield (*path, key)
        yield from places(one, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, draw: random.Random) -> Any:
    path = draw.choice(list(places(value)))
    _at(value, path[:-1])[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return value


def _removed(value: Any, draw: random.Random) -> Any:
    path = draw.choice(list(places(value)))
    del _at(value, path[:-1])[path[-1]]
    return value


def _added(value: Any, draw: random.Random) -> Any:
    objects = [(), *(path for path in places(value) if isinstance(_at(value, path), dict))]
    _at(value, draw.choice(objects))[draw.choice(["x", "", "format", "name", "auto_map"])] = draw.choice(VALUES)
    return value


def _deepened(value: Any, draw: random.Random) -> Any:
    path = draw.choice(list(places(value)))
    deep: Any = None
    for _ in range(draw.choice([20, 90, 300])):
        deep = [deep] if draw.random() < 0.5 else {"x": deep}
    _at(value, path[:-1])[path[-1]] = deep
    return value


def _another(value: Any, draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))


STRUCTURES = (_replaced, _replaced, _replaced, _replaced, _removed, _removed, _added, _deepened, _another)


def _doubled(content: bytes, draw: random.Random) -> bytes:
    return content.replace(b"{", b'{"x": 1, "x": 2, ', 1) if content.lstrip()[:1] == b"{" else content + content


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda content, draw: b"",
    lambda content, draw: content[: draw.randrange(len(content))],
    lambda content, draw: b"\xef\xbb\xbf" + content,
    lambda content, draw: content[: (at := draw.randrange(len(content)))] + b"\xff\xfe" + content[at:],
    lambda content, draw: content[: (at := draw.randrange(len(content)))] + b"\x00" + content[at:],
    lambda content, draw: content.decode().encode("utf-16"),
    lambda content, draw: content + content,
    lambda content, draw: b"[" * 100_000,
    lambda content, draw: b'{"a":' * 50_000,
    lambda content, draw: b"1" * 5_000,
    _doubled,
    lambda content, draw: bytes(draw.randrange(256) for _ in range(200)),
)
"""Damage to a file whatever it holds."""


def damaged(content: bytes, draw: random.Random, of_yaml: bool = False) -> bytes:
    """A file with one fault, drawn."""
    if draw.random() < 0.25:
        return draw.choice(BYTES)(content, draw)
    value = draw.choice(STRUCTURES)(yaml.safe_load(content) if of_yaml else json.loads(content), draw)
    text = yaml.safe_dump(value) if of_yaml else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")
