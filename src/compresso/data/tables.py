"""Rows of tables: parquet files, and the arrow files of a data set saved to disk.

Only the columns that mean something are read; the others are named with each row, so that they can be counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from compresso.data.lines import MAX_BYTES, check_size
from compresso.data.record_forms import RecordForm, printable
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


def parquet_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of a parquet file. Raises DataError if no column of it means something."""
    with pyarrow.parquet.ParquetFile(path) as file:
        known, others = divided(path, file.schema_arrow.names, form)
        yield from _batches(path, file.iter_batches(batch_size=_TOGETHER, columns=known), others)


def arrow_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of an arrow file as `datasets` saves them. Raises DataError if no column of it means something."""
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        known, others = divided(path, stream.schema.names, form)
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


def divided(path: Path, names: list[str], form: RecordForm) -> tuple[list[str], tuple[str, ...]]:
    """The columns that mean something, and the others, fit to be printed."""
    known = [name for name in form.columns if name in names]
    if not known:
        raise DataError(f"{path}: columns are: {', '.join(map(printable, names[:_NAMED]))}; wanted {form.wanted}")
    return known, tuple(printable(name) for name in names if name not in known)
