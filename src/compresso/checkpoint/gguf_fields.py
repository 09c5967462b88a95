"""The named values of a GGUF file, each of its type or refused by name."""

import math
from typing import TypeVar

import numpy as np

from compresso.checkpoint.gguf_header import GgufHeader
from compresso.core.plain_values import shown
from compresso.errors import CheckpointError

T = TypeVar("T")
_WORDS: dict[type, str] = {
    int: "a whole number that is not negative",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


class Fields:
    """A header's values; those of its architecture by the rest of their names."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.arch = self.text("general.architecture", whole=True)

    def refuse(self, why: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.header.path} {why}")

    def text(self, key: str, default: str | None = None, whole: bool = False) -> str:
        """A text. Raises CheckpointError if it is absent without a default, or something else."""
        return self._one(key, str, default, whole)

    def integer(self, key: str, default: int | None = None, whole: bool = False) -> int:
        """A whole number, not negative."""
        return self._one(key, int, default, whole)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number: the shortest decimal of what float32 holds, such as 1e-05 for 9.99999974737875e-06."""
        found = self._one(key, float, default, False)
        return float(str(np.float32(found))) if abs(found) < 3e38 else found

    def flag(self, key: str, default: bool, whole: bool = False) -> bool:
        """True or false."""
        return self._one(key, bool, default, whole)

    def has(self, key: str, whole: bool = False) -> bool:
        """Whether there is such a value."""
        return self._name(key, whole) in self.header.fields

    def texts(self, key: str) -> list[str] | None:
        """A list of texts; None if it is absent."""
        return self._many(key, str)

    def numbers(self, key: str) -> list[float] | None:
        """A list of finite numbers; None if it is absent."""
        return self._many(key, float)

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers; None if it is absent."""
        return self._many(key, int)

    def of_layers(self, key: str, layers: int, default: list[int] | None = None) -> list[int]:
        """A whole number for each layer, whether the file has one for all or a list."""
        found = self.header.fields.get(self._name(key, False))
        if not isinstance(found, list):
            return default if found is None and default is not None else [self.integer(key)] * layers
        if len(found) != layers or not all(type(one) is int and one >= 0 for one in found):
            raise self.refuse(f"has {len(found)} values in {self._name(key, False)}; {layers}, one a layer, are wanted")
        return [int(one) for one in found]

    def _name(self, key: str, whole: bool) -> str:
        return key if whole else f"{self.arch}.{key}"

    def _one(self, key: str, kind: type[T], default: T | None, whole: bool) -> T:
        name = self._name(key, whole)
        found = self.header.fields.get(name, default)
        if found is None:
            raise self.refuse(f"has no {name}, which is needed. Convert the model to GGUF again.")
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind or not _sound(found):
            raise self.refuse(f"has {shown(found, 60)} as {name}; {_WORDS[kind]} is wanted")
        return found

    def _many(self, key: str, kind: type[T]) -> list[T] | None:
        found = self.header.fields.get(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(type(one) is kind and (kind is int or _sound(one)) for one in found):
            raise self.refuse(f"has something else in {key} than a list, each {_WORDS[kind]}")
        return list(found)  # type: ignore[arg-type]


def _sound(value: object) -> bool:
    """Whether a number is finite, and a whole one not negative."""
    if isinstance(value, bool | str):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and (isinstance(value, float) or value >= 0)
