"""What a safetensors file says it holds, checked by hand before anything else touches the file.

The format (huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header and the tensors' bytes. A
hostile or damaged header can name regions outside the file, overlap them, or be so large or so deep that parsing it
exhausts memory. So the header is scanned piece by piece: its size and the number and length of its entries are bounded,
and only one small entry at a time reaches the JSON parser. Stricter than the format in one point: it allows headers of
100 MB; no model comes near our 32 MB.
"""

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from math import prod
from pathlib import Path
from typing import Any

from compresso.errors import CheckpointError

MAX_HEADER_BYTES = 32_000_000
MAX_TENSORS = 100_000
_MAX_ENTRY_CHARS = 4_096
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_SPACE = re.compile(r"[ \t\r\n]*")
_BODY = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: dtype as safetensors spells it (`BF16`), shape, file name, and its bytes [begin, end) after
    the header.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file by name, with every claim of the header checked against the file's size; no tensor
    is read.

    Raises:
        CheckpointError: naming the file, and the tensor where one is at fault.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 10:
            raise _damaged(path, f"{size} bytes cannot hold a header")
        if length > size - 8:
            raise _damaged(
                path,
                f"its header claims {length} bytes, but only {size - 8} follow: it is truncated or not safetensors",
            )
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
        try:
            text = file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _damaged(path, "its header is not UTF-8") from error
    try:
        tensors = _entries(text, path)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not what safetensors writes ({error})") from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            what = (
                "overlaps the tensor before it"
                if tensor.begin < end
                else f"leaves {tensor.begin - end} bytes unused before it"
            )
            raise _damaged(path, f"'{_short(name)}' {what}")
        end = tensor.end
    if end != size - 8 - length:
        raise _damaged(
            path,
            f"its tensors need {end} bytes, the file holds {size - 8 - length}: it is truncated, or something was"
            " appended",
        )
    return tensors


def _entries(text: str, path: Path) -> dict[str, TensorInfo]:
    """Scan the header's JSON object. Raises ValueError where it is not one of named tensor
    entries and string metadata.
    """
    tensors: dict[str, TensorInfo] = {}
    at = _expect(text, 0, "{")
    while text[at : at + 1] != "}":
        name, at = _string(text, at)
        at = _expect(text, at, ":")
        if name == "__metadata__":
            at = _skip_metadata(text, at)
        else:
            body = _BODY.match(text, at, at + _MAX_ENTRY_CHARS)
            if body is None:
                raise ValueError(f"'{_short(name)}' has no entry")
            if name in tensors or len(tensors) == MAX_TENSORS:
                raise ValueError(
                    f"'{_short(name)}' occurs twice" if name in tensors else f"more than {MAX_TENSORS} tensors"
                )
            tensors[name] = _entry(name, json.loads(body[0]), path)
            at = body.end()
        at = _next(text, at)
    if text[at + 1 :].strip(" \t\r\n"):
        raise ValueError("text after its end")
    return tensors


def _entry(name: str, entry: Any, path: Path) -> TensorInfo:
    """One tensor's claims. Raises ValueError if they contradict each other."""
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"'{_short(name)}' has unknown dtype {_short(str(dtype))}")
    whole = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets))
    )
    if not whole or len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"'{_short(name)}' has no proper shape and offsets")
    bits = prod(shape) * _BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(f"'{_short(name)}' claims {dtype} {shape}, which is not what its offsets {offsets} hold")
    return TensorInfo(dtype, tuple(shape), path.name, offsets[0], offsets[1])


def _skip_metadata(text: str, at: int) -> int:
    """Position after an object of strings."""
    at, pairs = _expect(text, at, "{"), 0
    while text[at : at + 1] != "}":
        pairs += 1
        if pairs > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} notes")
        _, at = _string(text, at)
        _, at = _string(text, _expect(text, at, ":"))
        at = _next(text, at)
    return at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    """The JSON string at `at`, and the position after it."""
    if text[at : at + 1] != '"':
        raise ValueError("a name is missing")
    return scanstring(text, at + 1, True)


def _expect(text: str, at: int, mark: str) -> int:
    """Position after `mark` and the white space around it."""
    at = _SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
    if text[at : at + 1] != mark:
        raise ValueError(f"'{mark}' is missing")
    return _SPACE.match(text, at + 1).end()  # pyright: ignore[reportOptionalMemberAccess]


def _next(text: str, at: int) -> int:
    """Position of the next name or of the closing brace."""
    at = _SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
    if text[at : at + 1] == "}":
        return at
    at = _expect(text, at, ",")
    if text[at : at + 1] == "}":
        raise ValueError("a name is missing")
    return at


def _short(name: str) -> str:
    """A name fit for a one-line message."""
    return (name if len(name) <= 80 else name[:77] + "...").encode("unicode_escape").decode()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {why}. Fetch or write the file again.")
