"""Rows as they lie on the hub, one shape each: what is read of them, what is passed over by name, and what is refused
with the column named.
"""

from pathlib import Path

import pytest

from compresso.data.columns import TEXTS, parse, take
from compresso.data.formats import SUFFIXES
from compresso.data.record_forms import BadRecord
from compresso.data.records import Chat, Instruction, Message, Record, Text
from compresso.data.turns import ROLES

U, A = {"role": "user", "content": "Tell one."}, {"role": "assistant", "content": "Once."}
TALK = Chat((Message("user", "Tell one."), Message("assistant", "Once.")))


def human(text: str, role: str = "human") -> dict[str, str]:
    return {"from": role, "value": text}


def chat(*turns: str) -> Chat:
    """A conversation from "u:Hi", "a:Hello", "s:Be kind."."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return Chat(tuple(Message(roles[turn[0]], turn[2:]) for turn in turns))  # type: ignore[arg-type]


READ: list[tuple[str, dict, Record]] = [
    ("prompt + completion", {"prompt": "Hi", "completion": "Once."}, Instruction("Hi", "", "Once.")),
    ("prompt + response", {"prompt": "Hi", "response": "Once."}, Instruction("Hi", "", "Once.")),
    ("question + answer", {"question": "Hi", "answer": "Once.\n#### 7"}, Instruction("Hi", "", "Once.\n#### 7")),
    ("query + response", {"query": "Hi", "response": "Once."}, Instruction("Hi", "", "Once.")),
    ("input + output", {"input": "Hi", "output": "Once."}, Instruction("Hi", "", "Once.")),
    ("dolly", {"instruction": "Hi", "context": "c", "response": "Once."}, Instruction("Hi", "c", "Once.")),
    ("dolly without context", {"instruction": "Hi", "context": "", "response": "O."}, Instruction("Hi", "", "O.")),
    ("the request in the input", {"instruction": "", "input": "Hi", "output": "O."}, Instruction("Hi", "", "O.")),
    ("an answer that is not there yet", {"prompt": "Hi", "response": ""}, Instruction("Hi", "", "")),
    ("text under another name", {"content": "Once upon a time."}, Text("Once upon a time.")),
    ("null beside text", {"messages": None, "text": "Once."}, Text("Once.")),
    ("messages under another name", {"conversations": [U, A]}, TALK),
    ("one conversation", {"conversation": [U, A]}, TALK),
    ("roles in capitals", {"messages": [{**U, "role": "User"}, {**A, "role": "Assistant"}]}, TALK),
    ("a turn of a prompt", {"prompt": [U], "completion": [A]}, TALK),
    ("a prompt and turns of an answer", {"prompt": "Tell one.", "completion": [A]}, TALK),
    (
        "a longer prompt",
        {"prompt": [U, A, U], "completion": "More."},
        Chat((*TALK.messages, *chat("u:Tell one.", "a:More.").messages)),
    ),
    ("preference, strings", {"prompt": "Hi", "chosen": "Once."}, Instruction("Hi", "", "Once.")),
    ("preference, the prompt in the chosen", {"prompt": "Tell one.", "chosen": [U, A]}, TALK),
    ("preference, the prompt before it", {"prompt": [U], "chosen": [A]}, TALK),
    ("preference, no prompt", {"chosen": [U, A]}, TALK),
    ("preference, question", {"system": "S", "question": "Hi", "chosen": "O."}, chat("s:S", "u:Hi", "a:O.")),
    (
        "a transcript",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Oh\nyes.\n\nHuman: Q\n\nAssistant: R"},
        chat("u:Hi", "a:Oh\nyes.", "u:Q", "a:R"),
    ),
    ("a divided transcript", {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Oh."}, chat("u:Hi", "a:Oh.")),
    ("alpaca with system", {"instruction": "I", "input": "", "output": "O", "system": "S"}, chat("s:S", "u:I", "a:O")),
    (
        "alpaca with history",
        {"instruction": "I", "output": "O", "history": [["q", "r"]]},
        chat("u:q", "a:r", "u:I", "a:O"),
    ),
    (
        "alpaca with neither",
        {"instruction": "I", "output": "O", "system": "", "history": []},
        Instruction("I", "", "O"),
    ),
    ("orca", {"system_prompt": "S", "question": "Q", "response": "R"}, chat("s:S", "u:Q", "a:R")),
    ("a system column", {"system": "S", "conversations": [U, A]}, Chat((Message("system", "S"), *TALK.messages))),
    (
        "developer",
        {"messages": [{"role": "developer", "content": "S"}, U, A]},
        Chat((Message("system", "S"), *TALK.messages)),
    ),
    (
        "two system texts",
        {"messages": [{"role": "system", "content": "S"}, {"role": "developer", "content": "T"}, U, A]},
        Chat((Message("system", "S\n\nT"), *TALK.messages)),
    ),
    (
        "parts",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Tell "}, {"type": "text", "text": "one."}]},
                A,
            ]
        },
        TALK,
    ),
    ("a greeting", {"conversations": [human("Hello!", "gpt"), human("Tell one."), human("Once.", "gpt")]}, TALK),
    (
        "tools",
        {
            "conversations": [
                human("Add."),
                human("{}", "function_call"),
                human("3", "observation"),
                human("4", "tool"),
                human("It is 3.", "gpt"),
            ]
        },
        chat("u:Add.", "a:{}", "u:3\n\n4", "a:It is 3."),
    ),
]


@pytest.mark.parametrize(("row", "record"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_shapes_that_people_have_are_read(row: dict, record: Record) -> None:
    assert parse(row) == record
    assert set(row) <= set(TEXTS.columns), "tables read no other columns"


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "bing", "bard", "assistant", "model", "function_call"])
@pytest.mark.parametrize("asking", ["human", "user"])
def test_every_role_of_a_share_is_known(role: str, asking: str) -> None:
    assert parse({"conversations": [human("Tell one.", asking), human("Once.", role)]}) == TALK
    assert ROLES[role] == "assistant"


PASSED_OVER: list[tuple[dict, tuple[str, ...]]] = [
    ({"id": 3, "instruction": "I", "output": "O", "text": "T", "category": None}, ("id", "text")),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "score": 0.0}, ("rejected", "score")),
    ({"prompt": "Tell one.", "chosen": [U, A], "rejected": [U, A]}, ("rejected",)),
    ({"prompt": "Something else.", "chosen": [U, A]}, ("prompt",)),
    ({"instruction": "I", "input": "i", "context": "c", "response": "R"}, ("context",)),
    ({"messages": [U, A], "tools": "[]"}, ("tools",)),
    ({"messages": [{**U, "name": "Ann"}, {**A, "weight": 0}]}, ("messages.name", "messages.weight")),
    ({"messages": [{"role": "system", "content": "s"}, U, A], "system": "S"}, ("system",)),
    (
        {"conversations": [human("Hello!", "gpt"), human("Hi"), human("Yes.", "gpt")]},
        ("conversations: a first turn by the assistant",),
    ),
    ({"text": "T", "new\nline": 1, "x" * 99: 2}, ("new?line", "x" * 40 + "...")),
    ({"instruction": "I", "input": "", "output": "O", "history": [], "system": ""}, ()),
]


@pytest.mark.parametrize(("row", "unused"), PASSED_OVER, ids=[", ".join(names) for _, names in PASSED_OVER])
def test_what_is_not_read_is_named(row: dict, unused: tuple[str, ...]) -> None:
    assert take(row).unused == unused


REFUSED: list[tuple[dict, str]] = [
    ({"messages": [U, U, A]}, "in 'messages', turn 2 is by 'user'"),
    ({"messages": [U, {**A, "tool_calls": [{"id": 1}], "content": None}]}, "in 'messages', turn 2 has 'tool_calls'"),
    ({"messages": [U, {**A, "content": None}]}, "in 'messages', turn 2: field 'content' is null"),
    (
        {"messages": [{**U, "content": [{"type": "image_url", "image_url": "x"}]}, A]},
        "part 1 of 'content' has type 'image_url'",
    ),
    ({"messages": [{**U, "content": ["Hi"]}, A]}, "part 1 of 'content' is a string"),
    ({"messages": [U, {**A, "role": "narrator"}]}, "in 'messages', turn 2 has role 'narrator'; wanted one of system,"),
    (
        {"conversations": [human("3", "observation"), human("Hi")]},
        "turn 1 has from 'observation', and no assistant turn",
    ),
    ({"conversations": [human("Hi", "gpt"), human("Oh", "gpt")]}, "turn 1 is by 'assistant'"),
    ({"messages": "[]"}, "'messages' is a string"),
    ({"instruction": "I", "output": "O", "history": "before"}, "'history' is a string; wanted a list of pairs"),
    ({"instruction": "I", "output": "O", "history": [["q"]]}, "entry 1 of field 'history' is no pair"),
    ({"instruction": "I", "output": "O", "system": ["S"]}, "'system' is a list"),
    ({"question": "Q", "answer": True}, "'answer' is true/false"),
    ({"question": "Q", "choices": ["a"], "answer": 1}, "'answer' is a number"),
    ({"prompt": "", "response": "R"}, "'prompt' is empty"),
    ({"chosen": "just text", "rejected": "x"}, "'chosen' is a string without turns"),
    ({"chosen": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: R"}, "in 'chosen', turn 2 is by 'user'"),
    ({"prompt": ["Hi"], "completion": "x"}, "turn 1 of 'prompt' is a string"),
    (
        {"context": "c", "question": "q", "answers": {"text": ["a"]}},
        "fields are: context, question, answers; wanted instruction + output",
    ),
    ({"messages": None}, "'messages' is null"),
    ({"instruction": "I", "output": None}, "'output' is null"),
    ({"evil\nname": 1}, "fields are: evil?name; wanted"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_read_is_refused_by_name(row: dict, message: str) -> None:
    with pytest.raises(BadRecord) as raised:
        take(row)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_page_names_all_that_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    for name in (*TEXTS.columns, *ROLES, *SUFFIXES[::3]):
        assert f"`{name.removesuffix('.gz').removesuffix('.zst')}`" in page, name
