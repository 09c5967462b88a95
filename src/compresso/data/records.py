"""What one line of data can be: four kinds, whatever the columns were called.

    Instruction   what is asked, with an input or without, and the answer
    Chat          a conversation
    Text          a document
    Window        ready token ids, used as they are

Which columns become which is written in `columns`. A task whose rows mean something else reads them by a `RecordForm`
of its own; `labelled` has one.

Parsing is strict: what does not fit raises `BadRecord` with the reason, and the reader that knows the file and the line
decides what to do. A column that holds something and goes into no record is named, so that it can be counted and said.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]
LONGEST_NAME = 40
NAMED_BAD = 5
"""Bad records that are named; all are counted."""
KINDS = ("instruction", "chat", "text", "window")


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
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, its input ("" if it has none) and the response to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: an optional system message, then user and assistant in turn; at least one assistant message."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True, slots=True)
class Window:
    """A ready sequence of token ids."""

    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text or a pair of texts, and its label as the data writes it."""

    text: str
    second: str | None
    label: int | str


@dataclass(frozen=True, slots=True)
class Answered:
    """A question about a text, and its answers: each a part of the text, and the character at which it begins; none
    where the text does not answer it.

    `title` is what examples share that must not lie on both sides of a split; "" where nothing is said.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Pictured:
    """A picture's file, and its label as the data writes it."""

    image: bytes
    label: int | str


@dataclass(frozen=True, slots=True)
class Mapped:
    """A picture's file, and that of a map with the class of each of its pixels."""

    image: bytes
    classes: bytes


Record = Instruction | Chat | Text | Window | Labelled | Answered | Pictured | Mapped


@dataclass(frozen=True, slots=True)
class Records:
    """Data that was read: what it is, where it came from, and what was wrong with it.

    Args:
        kind: "instruction", "chat", "text", "window", or "mixed" where several sources were joined.
        rows: the records, in the order of their sources.
        source: what a person needs to find the data again; file names without folders.
        n_bad: lines that were skipped because they hold no record.
        bad: the first few of those, as "file:line: reason".
        parts: of several sources, each one's name and number of rows; empty for a single one.
        columns: those that rows were made of -> rows that were.
        passed_over: columns that held something and were not read -> rows in which they did.
        places: where each row stands, as "file:line"; empty where rows came from no file.
        sha256: identity of the rows, whatever file or hub they came from.
    """

    kind: str
    rows: Sequence[Record]
    source: str
    n_bad: int = 0
    bad: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    columns: Mapping[str, int] = field(default_factory=dict[str, int])
    passed_over: Mapping[str, int] = field(default_factory=dict[str, int])
    places: Sequence[str] = ()
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", digest(self.rows))

    def by_source(self) -> Iterator[tuple[str, Sequence[Record]]]:
        """Each source's name and rows, in order."""
        start = 0
        for name, n in self.parts or ((self.source, len(self.rows)),):
            yield name, self.rows[start : start + n]
            start += n

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        return self.places[index] if self.places else f"{self.source}: record {index + 1}"

    def texts(self) -> list[str]:
        """The documents among the rows, in order, empty ones included."""
        return [row.text for row in self.rows if isinstance(row, Text)]


def kind_of(record: Record) -> str:
    """The kind's name.

    >>> kind_of(Text("once"))
    'text'
    """
    return type(record).__name__.lower()


def digest(rows: Iterable[Record]) -> str:
    """sha256 over kind and content of every row, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([kind_of(row), *_fields(row)]).encode() + b"\n")
    return total.hexdigest()


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


def joint_kind(rows: Sequence[Record]) -> str:
    """The kind that all rows share, or "mixed"."""
    kinds = {kind_of(row) for row in rows}
    return kinds.pop() if len(kinds) == 1 else "mixed"


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


def _fields(row: Record) -> Iterator[object]:
    match row:
        case Instruction(instruction, input, output):
            yield from (instruction, input, output)
        case Chat(messages):
            yield from ([turn.role, turn.content] for turn in messages)
        case Text(text):
            yield text
        case Window(input_ids):
            yield input_ids
        case Labelled(text, second, label):
            yield from (text, second, label)
        case Answered(question, context, answers, title):
            yield from (question, context, answers, title)
        case Pictured(image, label):
            yield from (hashlib.sha256(image).hexdigest(), label)
        case Mapped(image, classes):
            yield from (hashlib.sha256(one).hexdigest() for one in (image, classes))


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
