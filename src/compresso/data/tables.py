"""Rows of tables: CSV and TSV with a header line, parquet files, and the arrow files of a data set saved to disk.

Of parquet and arrow only the columns that mean something are read; the others are named with each row, so that they can
be counted.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from compresso.data.lines import MAX_BYTES, MAX_LINE_BYTES, check_size, decoded_lines
from compresso.data.records import RecordForm, printable
from compresso.errors import DataError

_TOGETHER = 256  # rows taken out of a table at once
_NAMED = 8


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row: its place, its cells by column or why there are none, and columns that were not read at all."""

    place: str
    cells: dict[str, object]
    wrong: str = ""
    unread: tuple[str, ...] = ()


def separated_rows(path: Path, delimiter: str, form: RecordForm) -> Iterator[TableRow]:
    """Rows of a text file with a header line.

    Raises:
        DataError: the header names a column twice or none that means something, or a line is no text.
    """
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            with _wide_fields():
                fields = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise DataError(f"{place}: bad quoting ({error}); repair the header line") from error
            yield TableRow(place, {}, f"bad quoting ({error})")
            continue
        if fields is None:
            return
        if header is None:
            header = _header(path, fields, form)
        elif len(fields) == len(header):
            yield TableRow(place, dict(zip(header, fields, strict=True)))
        elif fields:
            yield TableRow(place, {}, f"has {len(fields)} fields, the header {len(header)}")


def parquet_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of a parquet file. Raises DataError if no column of it means something."""
    with pyarrow.parquet.ParquetFile(path) as file:
        known, others = _divided(path, file.schema_arrow.names, form)
        yield from _batches(path, file.iter_batches(batch_size=_TOGETHER, columns=known), others)


def arrow_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of an arrow file as `datasets` saves them. Raises DataError if no column of it means something."""
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        known, others = _divided(path, stream.schema.names, form)
        pieces = (
            batch.select(known).slice(start, _TOGETHER)
            for batch in stream
            for start in range(0, batch.num_rows, _TOGETHER)
        )
        yield from _batches(path, pieces, others)


def _batches(path: Path, batches: Iterator[pyarrow.RecordBatch], others: tuple[str, ...]) -> Iterator[TableRow]:
    number = total = 0
    for batch in batches:
        total += batch.nbytes
        check_size(path, total, MAX_BYTES)
        for cells in batch.to_pylist():
            number += 1
            yield TableRow(f"{path}: row {number}", cells, unread=others)


def _divided(path: Path, names: list[str], form: RecordForm) -> tuple[list[str], tuple[str, ...]]:
    """The columns that mean something, and the others, fit to be printed."""
    known = [name for name in form.columns if name in names]
    if not known:
        raise DataError(f"{path}: columns are: {', '.join(map(printable, names[:_NAMED]))}; wanted {form.wanted}")
    return known, tuple(printable(name) for name in names if name not in known)


def _header(path: Path, fields: list[str], form: RecordForm) -> list[str]:
    names = [name.strip() for name in fields]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}:1: the header names the column '{printable(twice)}' twice; rename one")
    _divided(path, names, form)
    return names


def _text_lines(path: Path) -> Iterator[str]:
    for number, line, wrong in decoded_lines(path):
        if wrong:
            raise DataError(f"{path}:{number}: {wrong}; repair the line")
        yield line


@contextmanager
def _wide_fields() -> Iterator[None]:
    """Let a cell be as long as a line may be: the csv module's own limit is less than a long document."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
