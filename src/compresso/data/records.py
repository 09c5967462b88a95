"""What one line of data can be, and how an untyped object becomes one.

Four kinds, distinguished by their fields (the first match wins, so an Alpaca row that also has a `text` column is an
instruction):

    Instruction   instruction, output, and optionally input          (Alpaca)
    Chat          messages [{role, content}], or conversations [{from, value}]
    Text          text
    Window        input_ids: ready token ids, used as they are

A task whose rows mean something else reads them by a `RecordForm` of its own; `labelled` has one.

Parsing is strict: what does not fit raises `BadRecord` with the reason, and the reader that knows the file and the line
decides what to do.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
KINDS = ("instruction", "chat", "text", "window")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class BadRecord(ValueError):
    """One object that is not a record; the message says what is wrong with it and is completed with the place by the
    reader.
    """


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


Record = Instruction | Chat | Text | Window | Labelled


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
        sha256: identity of the rows, whatever file or hub they came from.
    """

    kind: str
    rows: Sequence[Record]
    source: str
    n_bad: int = 0
    bad: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", digest(self.rows))

    def by_source(self) -> Iterator[tuple[str, Sequence[Record]]]:
        """Each source's name and rows, in order."""
        start = 0
        for name, n in self.parts or ((self.source, len(self.rows)),):
            yield name, self.rows[start : start + n]
            start += n

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
class RecordForm:
    """What a row of data holds.

    Args:
        columns: names that mean something, for files whose other columns need not be read.
        parse: an object -> the record that it describes; raises BadRecord.
        wanted: the sets of columns that make a record, in words.
    """

    columns: tuple[str, ...]
    parse: Callable[[object], "Record"]
    wanted: str


def parse(value: object) -> Record:
    """The record that `value` describes; a text or window stands for itself.

    Raises:
        BadRecord: it is not an object, has none of the known sets of fields, or a field has the wrong type or cannot be
            UTF-8.
    """
    if isinstance(value, Text | Window):
        return value
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with named fields")
    if "instruction" in value and "output" in value:
        given = value.get("input")
        instruction = text_of(value, "instruction")
        if not instruction:
            raise BadRecord("field 'instruction' is empty")
        return Instruction(instruction, "" if given is None else text_of(value, "input"), text_of(value, "output"))
    if "messages" in value:
        return Chat(_conversation(value["messages"], "messages", "role", "content"))
    if "conversations" in value:
        return Chat(_conversation(value["conversations"], "conversations", "from", "value"))
    if "text" in value:
        return Text(text_of(value, "text"))
    found = ", ".join(str(name) for name in list(value)[:8]) or "none"
    raise BadRecord(f"fields are: {found}; wanted {TEXTS.wanted}")


TEXTS = RecordForm(
    ("instruction", "input", "output", "messages", "conversations", "text"),
    parse,
    "instruction + output (+ input), messages, or text",
)
"""What language models read."""


def records_from(rows: Iterable[object], source: str, form: RecordForm = TEXTS) -> Records:
    """Records from objects that are already in memory.

    Raises:
        BadRecord: an object is no record, named by its place.
    """
    parsed: list[Record] = []
    for number, row in enumerate(rows, 1):
        try:
            parsed.append(form.parse(row))
        except BadRecord as error:
            raise BadRecord(f"{source}: record {number}: {error}") from error
    return Records(joint_kind(parsed), parsed, source)


def joint_kind(rows: Sequence[Record]) -> str:
    """The kind that all rows share, or "mixed"."""
    kinds = {kind_of(row) for row in rows}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _conversation(value: object, name: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRecord(f"field '{name}' is {type_name(value)}; wanted a list of turns")
    turns: list[Message] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise BadRecord(
                f"turn {number} of '{name}' is {type_name(turn)}; wanted an object with {role_key} and {content_key}"
            )
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise BadRecord(f"turn {number} has {role_key} {turn.get(role_key)!r}; wanted one of {', '.join(_ROLES)}")
        try:
            turns.append(Message(role, text_of(turn, content_key)))
        except BadRecord as error:
            raise BadRecord(f"turn {number}: {error}") from error
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken, len(turns) - len(spoken) + 1):
        wanted = "user" if (number - (len(turns) - len(spoken))) % 2 else "assistant"
        if turn.role != wanted:
            raise BadRecord(f"turn {number} is by '{turn.role}'; user and assistant must take turns, the user first")
    if len(spoken) < 2:
        raise BadRecord(f"field '{name}' has no assistant turn to learn from")
    return tuple(turns)


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


def type_name(value: object) -> str:
    """A value's type for people."""
    names = {
        "NoneType": "null",
        "str": "a string",
        "bool": "true/false",
        "int": "a number",
        "float": "a number",
        "list": "a list",
    }
    return "empty" if value in ([], ()) else names.get(type(value).__name__, f"a {type(value).__name__}")
