"""How a row of data is read: the columns of a task, what of a row went into no record, and what is no record at all.

Parsing is strict: what does not fit raises `BadRecord` with the reason, and the reader that knows the file and the line
decides what to do. A column that holds something and goes into no record is named, so that it can be counted and said.
A task whose rows mean something else reads them by a `RecordForm` of its own; `labelled` has one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compresso.data.records import Record, Records, joint_kind

LONGEST_NAME = 40
NAMED_BAD = 5
"""Bad records that are named; all are counted."""


class BadRecord(ValueError):
    """One object that is not a record; the message says what is wrong with it and is completed with the place by the
    reader.
    """


class UnknownFields(BadRecord):
    """An object of whose fields no record is made: which ones it has, and which are wanted."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(f"{found}; wanted {wanted}")
        self.found = found


@dataclass(frozen=True, slots=True)
class Taken:
    """What was read of one object.

    Args:
        record: it.
        unused: columns that hold something and went into no record, and what else was passed over, by name.
        used: columns that it was made of.
    """

    record: Record
    unused: tuple[str, ...] = ()
    used: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordForm:
    """What a row of data holds.

    Args:
        columns: names that mean something, for files whose other columns need not be read.
        take: an object -> the record that it describes, and what of it was not read; raises BadRecord.
        wanted: the sets of columns that make a record, in words.
        nested: of a .json file that is one object with "data", the place of each row in words, the row, and what is
            wrong if there is none; None where no such file has a meaning.
        folder: of a folder of pictures, the place of each row in words, and the row; nothing where it holds none. None
            where no such folder has a meaning.
    """

    columns: tuple[str, ...]
    take: Callable[[object], Taken]
    wanted: str
    nested: Callable[[Mapping[object, object]], Iterator[tuple[str, object, str]]] | None = None
    folder: Callable[[Path], Iterator[tuple[str, object]]] | None = None


def holds(cell: object) -> bool:
    """Whether there is something in a cell: not null, and not an empty string, list or object."""
    return not (cell is None or (isinstance(cell, str | list | tuple | dict) and not cell))


def unused_of(row: Mapping[object, object] | Mapping[str, object], used: Iterable[str]) -> tuple[str, ...]:
    """Names of the columns that hold something and were not used, fit to be printed."""
    known = set(used)
    return tuple(printable(str(name)) for name, cell in row.items() if name not in known and holds(cell))


def printable(name: str) -> str:
    """A name from a file of strangers as it may stand in a line.

    >>> printable("tab\\there")
    'tab?here'
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in name[:LONGEST_NAME])
    return (shown + ("..." if len(name) > LONGEST_NAME else "")).strip() or "(no name)"


def records_from(rows: Iterable[object], source: str, form: RecordForm, skip_bad: bool = False) -> Records:
    """Records from objects that are already in memory.

    Args:
        rows: they.
        source: where they come from, in words.
        form: what a row holds.
        skip_bad: leave objects out (counted) that are no records, instead of raising.

    Raises:
        BadRecord: an object is no record, named by its place; or none is.
    """
    parsed: list[Record] = []
    bad: list[str] = []
    columns: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            taken = form.take(row)
        except BadRecord as error:
            bad.append(f"{source}: record {number}: {error}")
            if not skip_bad:
                raise BadRecord(bad[0]) from error
            continue
        parsed.append(taken.record)
        columns.update(taken.used)
        passed_over.update(taken.unused)
    if bad and not parsed:
        raise BadRecord(bad[0])
    return Records(
        joint_kind(parsed),
        parsed,
        source,
        len(bad),
        tuple(bad[:NAMED_BAD]),
        columns=dict(columns),
        passed_over=dict(passed_over),
    )


def text_of(value: Mapping[object, object], name: str) -> str:
    """A field that is text. Raises BadRecord."""
    if name not in value:
        raise BadRecord(f"field '{name}' is missing")
    text = value[name]
    if not isinstance(text, str):
        raise BadRecord(f"field '{name}' is {type_name(text)}; wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"field '{name}' holds half of a surrogate pair at character {error.start}, which is no text"
        ) from error
    return text


def type_name(value: object) -> str:
    """A value's type for people."""
    names = {
        "NoneType": "null",
        "str": "a string",
        "bool": "true/false",
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "dict": "an object",
    }
    return "empty" if value in ([], ()) else names.get(type(value).__name__, f"a {type(value).__name__}")
