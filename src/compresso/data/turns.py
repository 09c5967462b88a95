"""Conversations as they lie in files, and how they become a system text, then user and assistant in turn.

A turn has a role (`role` or `from`) and a content (`content` or `value`), which is a string or a list of text parts.

    user       user, human
    assistant  assistant, gpt, chatgpt, bing, bard, model; function_call: the call is what the assistant writes
    system     system, developer; at the beginning only, several are joined
    user       tool, observation, function: what a tool gave back stands where the model reads, after an assistant turn

A greeting by the assistant before anything was asked is left out: no request belongs to it. Calls in a field of their
own (`tool_calls`) are refused, for every model writes them in a form of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compresso.data.prompt import BETWEEN_BLOCKS
from compresso.data.record_forms import BadRecord, text_of, type_name, unused_of
from compresso.data.records import Message, Role

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "user"),
}
_TOOLS = ("tool", "observation", "function")
_CALLS = ("tool_calls", "function_call")
_READ = ("role", "from", "content", "value")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation: its messages, and what of it was passed over, by name."""

    messages: tuple[Message, ...]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Turn:
    """One turn with its number in the file."""

    number: int
    role: Role
    content: str
    of_tool: bool = False


def turns_of(value: object, name: str) -> Turns:
    """The conversation that a column holds.

    Args:
        value: a list of turns.
        name: of the column, for messages.

    Raises:
        BadRecord: it is no such list, a turn has an unknown role or a content that is no text, or user and assistant
            do not take turns.
    """
    turns, unused = _listed(value, name)
    opening, spoken = _opening(turns)
    if len(spoken) > 1 and spoken[0].role == "assistant" and spoken[1].role == "user":
        spoken = spoken[1:]
        unused = (*unused, f"{name}: a first turn by the assistant")
    for place, turn in enumerate(spoken):
        if turn.role != ("assistant" if place % 2 else "user"):
            raise BadRecord(
                f"in '{name}', turn {turn.number} is by '{turn.role}'; user and assistant must take turns, the user"
                " first"
            )
    if len(spoken) < 2:
        raise BadRecord(f"field '{name}' has no assistant turn to learn from")
    return Turns(tuple(Message(turn.role, turn.content) for turn in (*opening, *spoken)), unused)


def beginning_of(value: object, name: str) -> Turns:
    """Turns that need no answer yet, such as those of a prompt column; a string is one user turn. Raises BadRecord."""
    if isinstance(value, str):
        if not value:
            raise BadRecord(f"field '{name}' is empty")
        return Turns((Message("user", value),))
    turns, unused = _listed(value, name)
    return Turns(tuple(Message(turn.role, turn.content) for turn in turns), unused)


def joined(turns: Sequence[Message], name: str) -> tuple[Message, ...]:
    """Messages from several columns as one conversation, by the rules of `turns_of`. Raises BadRecord."""
    return turns_of([{"role": turn.role, "content": turn.content} for turn in turns], name).messages


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation of "Human:" and "Assistant:", each after an empty line."""
    return bool(_SPEAKER.match(text))


def transcript_turns(text: str, name: str) -> tuple[Message, ...]:
    """The conversation in a transcript of "Human:" and "Assistant:". Raises BadRecord."""
    pieces = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return turns_of([{"role": roles[speaker], "content": said.strip()} for speaker, said in pairs], name).messages


def _listed(value: object, name: str) -> tuple[list[_Turn], tuple[str, ...]]:
    """The turns as they stand, and names of their fields that hold something else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRecord(f"field '{name}' is {type_name(value)}; wanted a list of turns")
    turns: list[_Turn] = []
    unused: dict[str, None] = {}
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise BadRecord(
                f"turn {number} of '{name}' is {type_name(turn)}; wanted an object with role and content, or from and"
                " value"
            )
        role_key = "from" if "from" in turn and "role" not in turn else "role"
        said = turn.get(role_key)
        role = ROLES.get(str(said).lower())
        if role is None:
            raise BadRecord(f"in '{name}', turn {number} has {role_key} {said!r}; wanted one of {', '.join(ROLES)}")
        for call in _CALLS:
            if turn.get(call):
                raise BadRecord(
                    f"in '{name}', turn {number} has '{call}', which is not read: every model writes calls in a form of"
                    " its own; write them into the content as yours does"
                )
        of_tool = str(said).lower() in _TOOLS
        if of_tool and not any(other.role == "assistant" for other in turns):
            raise BadRecord(
                f"in '{name}', turn {number} has {role_key} {said!r}, and no assistant turn stands before it"
            )
        try:
            content = _content(turn, "value" if "value" in turn and "content" not in turn else "content")
        except BadRecord as error:
            raise BadRecord(f"in '{name}', turn {number}: {error}") from error
        unused |= dict.fromkeys(f"{name}.{field}" for field in unused_of(turn, _READ))
        if of_tool and turns[-1].of_tool:  # several calls were answered at once
            turns[-1] = replace(turns[-1], content=turns[-1].content + BETWEEN_BLOCKS + content)
        else:
            turns.append(_Turn(number, role, content, of_tool))
    return turns, tuple(unused)


def _opening(turns: Sequence[_Turn]) -> tuple[list[_Turn], list[_Turn]]:
    """The system texts at the beginning as one, if there are any, and the turns behind them."""
    n = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    if not n:
        return [], list(turns)
    said = BETWEEN_BLOCKS.join(turn.content for turn in turns[:n])
    return [replace(turns[0], content=said)], list(turns[n:])


def _content(turn: Mapping[object, object], key: str) -> str:
    """What a turn says. Raises BadRecord."""
    value = turn.get(key)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return text_of(turn, key)
    texts: list[str] = []
    for number, part in enumerate(value, 1):
        if not isinstance(part, Mapping):
            raise BadRecord(f"part {number} of '{key}' is {type_name(part)}; wanted an object with type and text")
        if part.get("type") != "text":
            raise BadRecord(
                f"part {number} of '{key}' has type {part.get('type')!r}; only parts of type 'text' are read"
            )
        texts.append(text_of(part, "text"))
    return "".join(texts)
