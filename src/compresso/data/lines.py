"""Numbered lines of text files that come from strangers: a line, a file and what a compressed file may grow to have
caps.

gzip and zstd are read as streams, so a small file that would fill the memory is refused when it passes a cap, not
after. zstd comes with pyarrow, which reads the tables.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow

from compresso.errors import DataError, first_line

MAX_LINE_BYTES = 8 * 2**20
MAX_BYTES = 4 * 2**30
"""Most bytes a file may hold once decompressed."""
MAX_RATIO = 200
"""Most bytes that one compressed byte may become, looked at beyond `RATIO_FREE_BYTES`;
text compresses 3 to 20 times.
"""
RATIO_FREE_BYTES = 64 * 2**20
MAX_WHOLE_BYTES = 256 * 2**20
"""Most bytes of a file that has to be read at once; SQuAD 2's training part has 42 million."""
_AT_ONCE = 2**20


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a disk, or a packed file that was cut short, says while it is read into a DataError of one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip data ({error}); fetch or compress the file again") from error
    except OSError as error:
        if path.suffix.lower() == ".zst" and error.errno is None:  # as pyarrow says it
            raise DataError(
                f"{path}: broken zstd data ({first_line(error)}); fetch or compress the file again"
            ) from error
        raise DataError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file and its permissions"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one longer than the cap, of which nothing is kept."""
    total = 0
    with readable(path), opened(path) as stream:
        packed_bytes = path.stat().st_size
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            total += len(line)
            fits = len(line) <= MAX_LINE_BYTES
            while not line.endswith(b"\n") and not fits and (line := stream.readline(MAX_LINE_BYTES)):
                total += len(line)
                check_size(path, total, packed_bytes)
            check_size(path, total, packed_bytes)
            yield number, line if fits else None


def opened(path: Path) -> IO[bytes]:
    """The file's bytes as a stream, decompressed if its name ends in .gz or .zst.

    Raises:
        DataError: zstd is asked for, and this pyarrow cannot read it.
    """
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")  # pyright: ignore[reportReturnType]
        case ".zst":
            if not pyarrow.Codec.is_available("zstd"):
                raise DataError(f"{path}: this pyarrow was built without zstd; decompress the file first (zstd -d)")
            packed = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
            return io.BufferedReader(packed)  # pyright: ignore[reportArgumentType, reportReturnType]
        case _:
            return path.open("rb")


def check_size(path: Path, total: int, packed_bytes: int) -> None:
    """Refuse `total` bytes that came out of `packed_bytes` if they are too many,
    or too many for what they came out of.
    """
    if total > MAX_BYTES:
        raise DataError(f"{path}: holds more than {MAX_BYTES} bytes; split the file")
    if total > RATIO_FREE_BYTES and total > MAX_RATIO * packed_bytes:
        grown = f"{packed_bytes} bytes grow to more than {total}, beyond the {MAX_RATIO}-fold allowed"
        raise DataError(f"{path}: {grown}; decompress the file yourself if you trust it")


def decoded_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Numbered lines as (number, text, what is wrong with it or ""), without the byte order mark of some editors."""
    for number, line in _lines(path):
        if line is None:
            yield number, "", f"the line is longer than {MAX_LINE_BYTES} bytes"
            continue
        try:
            yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode(), ""
        except UnicodeDecodeError as error:
            yield number, "", f"byte {error.start + 1} of the line is not UTF-8"


def whole_text(path: Path) -> str:
    """A file's text, without the byte order mark of some editors. Raises DataError if it cannot be read, is too large
    or not UTF-8.
    """
    parts, total = list[bytes](), 0
    with readable(path), opened(path) as stream:
        packed_bytes = path.stat().st_size
        while part := stream.read(_AT_ONCE):
            total += len(part)
            check_size(path, total, packed_bytes)
            if total > MAX_WHOLE_BYTES:
                raise DataError(
                    f"{path}: one JSON object of more than {MAX_WHOLE_BYTES} bytes; write its rows as .jsonl"
                )
            parts.append(part)
    content = b"".join(parts)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; repair the file") from error
