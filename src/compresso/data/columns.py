"""From the columns that people have to a record; the first set of columns that a row has decides what it is.

    instruction + output or response (+ input or context, system, history)    Alpaca, Dolly
    messages, conversations or conversation (+ system)                         chat models', ShareGPT's
    prompt, question or instruction + chosen                                   preference pairs: the chosen answer
    chosen                                                                     as turns, or a transcript of HH-RLHF
    prompt + completion or response; question + answer or response; query + response; input + output
    text or content                                                            documents

`prompt`, `completion` and `chosen` may hold turns instead of a string. A column with null in it counts as absent. What
holds something and is not read (an id, the rejected answer) is named, never dropped in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compresso.data.prompt import user_turn
from compresso.data.record_forms import (
    BadRecord,
    RecordForm,
    Taken,
    UnknownFields,
    holds,
    printable,
    text_of,
    type_name,
    unused_of,
)
from compresso.data.records import Chat, Instruction, Message, Record, Text, Window
from compresso.data.turns import Turns, beginning_of, is_transcript, joined, transcript_turns, turns_of

_Row = Mapping[object, object]
_SYSTEM = ("system", "system_prompt")
_GIVEN = ("input", "context")
_ASKED_WITH_CHOSEN = ("prompt", "question", "instruction", "input")
_WANTED = (
    "instruction + output or response (+ input or context, system, history), messages, conversations, prompt +"
    " completion or response, question + answer or response, query + response, prompt + chosen, input + output, text,"
    " content or sentence"
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Columns that must be there, and how a row with them is read: to a record, names of columns used, and what of
    those was passed over.
    """

    needs: tuple[str, ...]
    read: Callable[[_Row, tuple[str, ...]], tuple[Record, set[str], tuple[str, ...]]]


def take(value: object) -> Taken:
    """The record that `value` describes; a text or window stands for itself.

    Raises:
        UnknownFields: it has none of the known sets of fields.
        BadRecord: it is not an object, or a field has the wrong type or cannot be UTF-8.
    """
    if isinstance(value, Text | Window):
        return Taken(value)
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with named fields")
    filled = {name for name, cell in value.items() if cell is not None}
    for names in (filled, set(value)):
        for shape in _SHAPES:
            if names.issuperset(shape.needs):
                record, used, unused = shape.read(value, shape.needs)
                return Taken(record, (*unused_of(value, used), *unused), tuple(name for name in value if name in used))
    found = ", ".join(printable(str(name)) for name in list(value)[:8]) or "none"
    raise UnknownFields(f"fields are: {found}", _WANTED)


def parse(value: object) -> Record:
    """The record alone, as `take` reads it. Raises BadRecord."""
    return take(value).record


def _asked(row: _Row, needs: tuple[str, ...]) -> tuple[Record, set[str], tuple[str, ...]]:
    """A request and its answer in two columns, with what stands before them in others."""
    ask, answer = needs
    if isinstance(row[ask], list) or _is_turns(row[answer]):
        return _continued(row, ask, answer)
    used = {ask, answer}
    asked, given = text_of(row, ask), ""
    name = next((name for name in _GIVEN if name != ask and holds(row.get(name))), None)
    if name is not None:
        given = text_of(row, name)
        used.add(name)
    if not asked:
        if not given:
            raise BadRecord(f"field '{ask}' is empty")
        asked, given = given, ""
    output = text_of(row, answer)
    system = _system(row, used)
    if history := _history(row.get("history")):
        used.add("history")
    if not system and not history:
        return Instruction(asked, given, output), used, ()
    last = (Message("user", user_turn(asked, given)), Message("assistant", output))
    return Chat((*system, *history, *last)), used, ()


def _chat(row: _Row, needs: tuple[str, ...]) -> tuple[Record, set[str], tuple[str, ...]]:
    """A conversation in one column; a system text may stand in another."""
    turns = turns_of(row[needs[0]], needs[0])
    used = set(needs)
    system = () if turns.messages[0].role == "system" else _system(row, used)
    return Chat((*system, *turns.messages)), used, turns.unused


def _preferred(row: _Row, needs: tuple[str, ...]) -> tuple[Record, set[str], tuple[str, ...]]:
    """The chosen answer of a preference pair, with what was asked."""
    ask = next((name for name in _ASKED_WITH_CHOSEN if holds(row.get(name))), None)
    chosen = row["chosen"]
    if isinstance(chosen, str):
        asked = row.get(ask) if ask else None
        if is_transcript(chosen):
            return Chat(transcript_turns(chosen, "chosen")), {"chosen"}, ()
        if ask and isinstance(asked, str) and is_transcript(asked):
            return Chat(transcript_turns(asked + text_of(row, "chosen"), ask)), {ask, "chosen"}, ()
        if ask is None:
            raise BadRecord(
                "field 'chosen' is a string without turns, and no column 'prompt' says what was asked; wanted messages,"
                " a transcript of Human: and Assistant:, or a prompt"
            )
        return _asked(row, (ask, "chosen"))
    if ask is None or _begins_itself(chosen):
        turns = turns_of(chosen, "chosen")
        used = {"chosen"} | ({ask} if ask and _says(row[ask], turns) else set())
        system = () if turns.messages[0].role == "system" else _system(row, used)
        return Chat((*system, *turns.messages)), used, turns.unused
    return _continued(row, ask, "chosen")


def _document(row: _Row, needs: tuple[str, ...]) -> tuple[Record, set[str], tuple[str, ...]]:
    return Text(text_of(row, needs[0])), set(needs), ()


def _continued(row: _Row, ask: str, answer: str) -> tuple[Record, set[str], tuple[str, ...]]:
    """A conversation that is divided over two columns, either of which may be a string."""
    before = beginning_of(row[ask], ask)
    used = {ask, answer}
    if isinstance(row[answer], str):
        after = Turns((Message("assistant", text_of(row, answer)),))
    else:
        after = beginning_of(row[answer], answer)
    system = () if before.messages[0].role == "system" else _system(row, used)
    messages = joined((*system, *before.messages, *after.messages), answer)
    return Chat(messages), used, (*before.unused, *after.unused)


def _is_turns(value: object) -> bool:
    """Whether a cell holds objects, as conversations do."""
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _begins_itself(chosen: object) -> bool:
    """Whether turns begin with what was asked, and not with the answer to it."""
    if not _is_turns(chosen) or not chosen:
        return True  # `turns_of` says what is wrong with it
    first = chosen[0]  # pyright: ignore[reportIndexIssue]
    return str(first.get("role", first.get("from"))).lower() not in ("assistant", "gpt")


def _says(asked: object, turns: Turns) -> bool:
    """Whether a conversation holds what a prompt column asks."""
    said = [turn.content for turn in turns.messages]
    if isinstance(asked, str):
        return asked in said
    return _is_turns(asked) and all(one.get("content", one.get("value")) in said for one in asked)  # pyright: ignore


def _system(row: _Row, used: set[str]) -> tuple[Message, ...]:
    """The system text of a row, if it has one; its column is added to those used."""
    for name in _SYSTEM:
        if holds(row.get(name)):
            used.add(name)
            return (Message("system", text_of(row, name)),)
    return ()


def _history(value: object) -> list[Message]:
    """Earlier requests and answers."""
    if not holds(value):
        return []
    messages: list[Message] = []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRecord(f"field 'history' is {type_name(value)}; wanted a list of pairs [request, answer]")
    for number, pair in enumerate(value, 1):
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(said, str) for said in pair):
            raise BadRecord(f"entry {number} of field 'history' is no pair of strings; wanted [request, answer]")
        asked, answered = (text_of({"history": said}, "history") for said in pair)
        messages += [Message("user", asked), Message("assistant", answered)]
    return messages


_SHAPES = (
    _Shape(("instruction", "output"), _asked),
    _Shape(("messages",), _chat),
    _Shape(("conversations",), _chat),
    _Shape(("conversation",), _chat),
    _Shape(("chosen",), _preferred),
    _Shape(("instruction", "response"), _asked),
    _Shape(("prompt", "completion"), _asked),
    _Shape(("prompt", "response"), _asked),
    _Shape(("question", "answer"), _asked),
    _Shape(("question", "response"), _asked),
    _Shape(("query", "response"), _asked),
    _Shape(("input", "output"), _asked),
    _Shape(("text",), _document),
    _Shape(("content",), _document),
    _Shape(("sentence",), _document),
)
_COLUMNS = (*(name for shape in _SHAPES for name in shape.needs), *_GIVEN, *_SYSTEM, "history", "rejected")
TEXTS = RecordForm(tuple(dict.fromkeys(_COLUMNS)), take, _WANTED)
"""What language models read."""
