"""What a GGUF file says it holds, checked by hand before anything else touches the file.

The format is magic, version, two counts, that many named values, that many tensor entries, and the tensors' bytes, all
little-endian. The gguf package's own reader believes every length and every count; here each is compared with what is
left of the file, and with a most, before anything is read or made for it.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from compresso.checkpoint.gguf_package import Kind, kind_of
from compresso.checkpoint.header import MAX_TENSORS
from compresso.errors import CheckpointError

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 512_000_000
MAX_FIELDS = 10_000
MAX_ITEMS = 2**22
"""Entries of a list; 514,906: the merges of Gemma 3."""
_MAX_KEY, _MAX_NAME, _MAX_TEXT, _MAX_DIMS = 1_024, 512, 8_000_000, 4
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor: how its numbers are stored, shape (rows first, as in torch), and its bytes [begin, end) in the
    file.
    """

    kind: Kind
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything in a GGUF file but the tensors' bytes."""

    path: Path
    fields: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Fields and tensors of a GGUF file, with every claim checked against the file's size; no tensor is read.

    Raises:
        CheckpointError: naming the file, and the field or tensor where one is at fault.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            return _read(path, _Reader(file, min(size, MAX_HEADER_BYTES), size))
        except _Damaged as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Fetch or write the file again.") from error


class _Damaged(ValueError):
    """What is wrong with a file, in words."""


class _Reader:
    """Reads numbers and texts up to an end that it does not go beyond."""

    def __init__(self, file: BinaryIO, end: int, size: int) -> None:
        self.file, self.end, self.size, self.at = file, end, size, 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes. Raises _Damaged if there are fewer."""
        if count > self.end - self.at:
            why = "it is truncated" if self.end == self.size else f"at most {self.end} bytes are read of a header"
            raise _Damaged(f"{what} needs {count} bytes where {self.end - self.at} are left: {why}")
        self.at += count
        return self.file.read(count)

    def number(self, code: str, what: str) -> int:
        """One whole number."""
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0])

    def text(self, most: int, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.number("Q", f"the length of {what}")
        if length > most:
            raise _Damaged(f"{what} claims {length} bytes; at most {most} are read")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(f"{what} is not UTF-8") from error

    def value(self, code: int, key: str) -> Value:
        """A field's value of a type of the format."""
        if code == _TEXT:
            return self.text(_MAX_TEXT, f"'{key}'")
        if code == _LIST:
            return self.items(key)
        if code not in _NUMBERS:
            raise _Damaged(f"'{key}' has type {code}, which GGUF does not know")
        return struct.unpack(f"<{_NUMBERS[code]}", self.take(struct.calcsize(_NUMBERS[code]), f"'{key}'"))[0]

    def items(self, key: str) -> Value:
        """A list of numbers or texts."""
        code, count = self.number("I", f"'{key}'"), self.number("Q", f"'{key}'")
        if count > MAX_ITEMS:
            raise _Damaged(f"'{key}' claims {count} entries; at most {MAX_ITEMS} are read")
        if code == _TEXT:
            if count * 8 > self.end - self.at:
                raise _Damaged(f"'{key}' claims {count} texts where {self.end - self.at} bytes are left")
            return [self.text(_MAX_TEXT, f"an entry of '{key}'") for _ in range(count)]
        if code not in _NUMBERS:
            raise _Damaged(f"'{key}' is a list of type {code}; numbers and texts are read")
        layout = np.dtype(_NUMBERS[code]).newbyteorder("<")
        return np.frombuffer(self.take(count * layout.itemsize, f"'{key}'"), layout).tolist()


def _read(path: Path, reader: _Reader) -> GgufHeader:
    """Header of an open file. Raises _Damaged."""
    if (magic := reader.take(4, "the magic")) != MAGIC:
        raise _Damaged(f"it begins with {magic!r} where a GGUF file begins with {MAGIC!r}")
    version = reader.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise _Damaged("it is big-endian, and little-endian files are read")
    if version not in _VERSIONS:
        raise _Damaged(f"it is of GGUF version {version}; versions 2 and 3 are read")
    tensors, count = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of fields")
    for found, most, what in ((tensors, MAX_TENSORS, "tensors"), (count, MAX_FIELDS, "fields")):
        if found > most:
            raise _Damaged(f"it claims {found} {what}; at most {most} are read")
    fields: dict[str, Value] = {}
    for _ in range(count):
        key = reader.text(_MAX_KEY, "a field's name")
        if key in fields:
            raise _Damaged(f"the field '{_short(key)}' is there twice")
        fields[key] = reader.value(reader.number("I", f"'{_short(key)}'"), _short(key))
    entries = [_entry(reader) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {str(alignment)[:20]}; a power of two is wanted")
    start = -(-reader.at // alignment) * alignment
    return GgufHeader(path, fields, _placed(entries, start, alignment, reader.size))


def _entry(reader: _Reader) -> tuple[str, Kind, tuple[int, ...], int]:
    """Name, kind, shape and offset of the next tensor."""
    name = reader.text(_MAX_NAME, "a tensor's name")
    dims = reader.number("I", f"'{_short(name)}'")
    if not 1 <= dims <= _MAX_DIMS:
        raise _Damaged(f"the tensor '{_short(name)}' has {dims} dimensions; 1 to {_MAX_DIMS} are read")
    shape = tuple(reversed([reader.number("Q", f"'{_short(name)}'") for _ in range(dims)]))
    kind = kind_of(reader.number("I", f"'{_short(name)}'"))
    if not 0 < math.prod(shape) < 2**63:
        raise _Damaged(f"the tensor '{_short(name)}' has the shape {list(shape)}")
    if shape[-1] % kind.block:
        raise _Damaged(
            f"the tensor '{_short(name)}' has rows of {shape[-1]}, and {kind.name} holds multiples of {kind.block}"
        )
    return name, kind, shape, reader.number("Q", f"'{_short(name)}'")


def _placed(
    entries: list[tuple[str, Kind, tuple[int, ...], int]], start: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """Tensors by name. Raises _Damaged if names repeat, or bytes overlap or end beyond the file."""
    placed: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in entries:
        if name in placed:
            raise _Damaged(f"the tensor '{_short(name)}' is there twice")
        if offset % alignment:
            raise _Damaged(f"the tensor '{_short(name)}' lies at {offset}, which {alignment} does not divide")
        begin = start + offset
        end = begin + math.prod(shape) // kind.block * kind.bytes
        if end > size:
            raise _Damaged(
                f"the tensor '{_short(name)}' {list(shape)} ends at byte {end} of {size}: the file is truncated"
            )
        placed[name] = GgufTensor(kind, shape, begin, end)
    end = start
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].begin):
        if tensor.begin < end:
            raise _Damaged(f"the tensor '{_short(name)}' overlaps the one before it")
        end = tensor.end
    return placed


def _short(name: str) -> str:
    """A name fit for a one-line message."""
    return (name if len(name) <= 80 else name[:77] + "...").encode("unicode_escape").decode()
