"""What one line of data can be: four kinds, whatever the columns were called.

    Instruction   what is asked, with an input or without, and the answer
    Chat          a conversation
    Text          a document
    Window        ready token ids, used as they are

Those of tasks whose rows mean something else stand beside them. Which columns become which is written in `columns`;
how a row is read, in `record_forms`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
KINDS = ("instruction", "chat", "text", "window")


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
        notes: what a person should know of what was not read, a sentence each.
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
    notes: tuple[str, ...] = ()
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


def joint_kind(rows: Sequence[Record]) -> str:
    """The kind that all rows share, or "mixed"."""
    kinds = {kind_of(row) for row in rows}
    return kinds.pop() if len(kinds) == 1 else "mixed"


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
