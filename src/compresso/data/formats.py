"""Reading one local file into records; every bad line is named, none is dropped in silence.

    .jsonl                  one JSON object a line (blank lines separate nothing and are not counted)
    .json                   a list of objects; one object with "data", where the task knows such files (SQuAD's own);
                            else a file that does not begin with "[" is read as .jsonl
    .txt                    documents separated by blank lines; without any blank line, each line is a document
    .csv .tsv               rows under a header line
    .parquet                rows
    .arrow                  rows, as `datasets` saves them
    .safetensors            integer `input_ids [n, seq]`: ready windows, in order

All that is text may also be packed, as .gz or .zst. The first good line decides what a file holds: conversations (of
one request or of several), texts or windows; a line of another kind is a bad line.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from safetensors import SafetensorError, safe_open

from compresso.core.counted import counted
from compresso.data.bad_lines import cure
from compresso.data.columns import TEXTS
from compresso.data.found import Found
from compresso.data.json_files import begins, json_lines, json_list, one_object
from compresso.data.lines import decoded_lines, readable
from compresso.data.record_forms import NAMED_BAD, BadRecord, RecordForm, printable
from compresso.data.records import Chat, Instruction, Record, Text, Window, kind_of
from compresso.data.separated import comma_rows, tab_rows
from compresso.data.tables import TableRow, arrow_rows, parquet_rows
from compresso.errors import DataError, first_line

_PACKED = ("", ".gz", ".zst")
SUFFIXES = (
    *(suffix + packed for suffix in (".jsonl", ".json", ".txt", ".csv", ".tsv") for packed in _PACKED),
    ".parquet",
    ".arrow",
    ".safetensors",
)
MAX_WINDOW_IDS = 2**25


@dataclass(frozen=True, slots=True)
class FileRecords:
    """What was read of a file.

    Args:
        rows: its records.
        n_bad, bad: the number of its bad lines, and the first few of them as "file:line: reason".
        columns: those that rows were made of -> rows that were.
        passed_over: columns that held something and were not read -> rows in which they did.
        places: where each record stands, as "file:line" without a folder.
    """

    rows: list[Record]
    n_bad: int
    bad: tuple[str, ...]
    columns: Mapping[str, int] = field(default_factory=dict[str, int])
    passed_over: Mapping[str, int] = field(default_factory=dict[str, int])
    places: list[str] = field(default_factory=list[str])


def suffix_of(path: Path) -> str:
    """The known suffix of a file name, or ""."""
    return max((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), key=len, default="")


def read_file(
    path: Path,
    skip_bad: bool | None = False,
    limit: int | None = None,
    form: RecordForm = TEXTS,
    like: Record | None = None,
) -> FileRecords:
    """Read a file, up to `limit` records of a form; of the kind of `like`, where other files came before it. None for
    `skip_bad` is False where nobody can choose.

    Raises:
        DataError: the file is missing, empty, unreadable, too large or of an unknown format; or it has a bad line and
            `skip_bad` is False; or it has no good line at all.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise DataError(f"{path}: unknown file format; wanted one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}; give the path of a data file")
    try:
        with readable(path):
            if path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty; give a file with at least one record")
            return _collect(path, _objects(path, suffix, form), skip_bad, limit, form, like)
    except (pyarrow.ArrowInvalid, SafetensorError) as error:
        raise DataError(
            f"{path}: not a readable {suffix} file ({first_line(error)}); fetch or write the file again"
        ) from error


def collect(path: Path, rows: Sequence[tuple[str, object]], skip_bad: bool | None, form: RecordForm) -> FileRecords:
    """Records of objects that lie in a folder, each with its place in words. Raises DataError as `read_file`."""
    return _collect(path, (Found(place, value) for place, value in rows), skip_bad, None, form, None)


def _collect(
    path: Path, found: Iterator[Found], skip_bad: bool | None, limit: int | None, form: RecordForm, like: Record | None
) -> FileRecords:
    rows: list[Record] = []
    places: list[str] = []
    bad: list[str] = []
    columns: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    n_bad = 0
    for each in found:
        try:
            if each.wrong:
                raise BadRecord(each.wrong)
            taken = form.take(each.value)
            row, first = taken.record, rows[0] if rows else like
            if first is not None and _sort(row) != _sort(first):
                raise BadRecord(
                    f"is of kind {kind_of(row)}, the lines before it of kind {kind_of(first)}; put each kind into its"
                    " own file"
                )
        except BadRecord as error:
            if not skip_bad:
                told = cure(each, found, form, skip_bad, bool(rows) or like is not None)
                raise DataError(f"{each.place}: {error}. {told}") from error
            n_bad += 1
            if len(bad) < NAMED_BAD:
                bad.append(f"{each.place}: {error}")
            continue
        rows.append(row)
        places.append(path.name + each.place.removeprefix(str(path)))
        columns.update(taken.used)
        passed_over.update(taken.unused)
        passed_over.update(each.unread)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(
            f"{path}: no record among {counted(n_bad, 'bad line')}; the first: {bad[0]}"
            if bad
            else f"{path}: the file holds no record"
        )
    return FileRecords(rows, n_bad, tuple(bad), dict(columns), dict(passed_over), places)


def _sort(record: Record) -> str:
    """What must be alike in a file: a request with its answer is a conversation, too."""
    return "conversation" if isinstance(record, Instruction | Chat) else kind_of(record)


def _objects(path: Path, suffix: str, form: RecordForm) -> Iterator[Found]:
    match suffix.removesuffix(".gz").removesuffix(".zst"):
        case ".jsonl":
            return json_lines(path)
        case ".json":
            if begins(path, "["):
                return json_list(path)
            whole = one_object(path, form.columns) if form.nested is not None and begins(path, "{") else None
            if form.nested is not None and whole is not None:
                return (
                    Found(f"{path}: {place}" if place else str(path), value, wrong)
                    for place, value, wrong in form.nested(whole)
                )
            return json_lines(path)
        case ".txt":
            return _paragraphs(path)
        case ".csv":
            return _table(comma_rows(path, form))
        case ".tsv":
            return _table(tab_rows(path, form))
        case ".parquet":
            return _table(parquet_rows(path, form))
        case ".arrow":
            return _table(arrow_rows(path, form))
        case _:
            return _windows(path)


def _paragraphs(path: Path) -> Iterator[Found]:
    lines = list(decoded_lines(path))
    blank_lines = any(not wrong and not line.strip() for _, line, wrong in lines)
    paragraph: list[str] = []
    first = 1
    for number, line, wrong in [*lines, (0, "", "")]:
        if paragraph and not wrong and (not line.strip() or not blank_lines):
            yield Found(f"{path}:{first}", Text("".join(paragraph).rstrip("\r\n")))
            paragraph = []
        if wrong:
            yield Found(f"{path}:{number}", wrong=wrong)
        elif line.strip():
            first = first if paragraph else number
            paragraph.append(line)


def _table(rows: Iterator[TableRow]) -> Iterator[Found]:
    return (Found(row.place, row.cells, row.wrong, row.unread) for row in rows)


def _windows(path: Path) -> Iterator[Found]:
    with safe_open(str(path), framework="pt") as file:
        if "input_ids" not in file.keys():  # noqa: SIM118 - not a mapping
            raise DataError(
                f"{path}: tensors are: {', '.join(list(file.keys())[:8]) or 'none'}; wanted input_ids [n, seq]"
            )
        shape = file.get_slice("input_ids").get_shape()
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise DataError(f"{path}: input_ids has shape {shape}; wanted [n, seq] with n >= 1 and seq >= 2")
        if shape[0] * shape[1] > MAX_WINDOW_IDS:
            raise DataError(
                f"{path}: input_ids has {shape[0] * shape[1]} ids; at most {MAX_WINDOW_IDS} are read. Split the file."
            )
        ids = file.get_tensor("input_ids")
        others = tuple(printable(name) for name in file.keys() if name != "input_ids")  # noqa: SIM118 - not a mapping
    if ids.is_floating_point() or ids.is_complex() or str(ids.dtype) == "torch.bool":
        raise DataError(f"{path}: input_ids is {str(ids.dtype).removeprefix('torch.')}; wanted an integer type")
    for number, window in enumerate(ids.tolist(), 1):
        wrong = f"id {min(window)} is negative" if min(window) < 0 else ""
        yield Found(f"{path}: window {number}", Window(tuple(window)), wrong, others)
