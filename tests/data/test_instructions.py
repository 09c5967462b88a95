"""The ids are those an engine computes from the rendered template, and the labels cover exactly the responses and their
end tokens.

The oracle for the labels knows the bytes of every token and counts them; it does not use the tokenizers' offsets.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.data.instructions import encode, encode_prompt, opening_ids
from compresso.data.prompt import collaborative_prompt, full_prompt, user_turn
from compresso.data.records import Chat, Instruction, Message, Record, Records, Text, Window
from compresso.data.template import apply_to_tokenizer_
from compresso.errors import DataError

from .conftest import byte_level
from .test_template import LAST_TURN

BYTES_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
per_tokenizer = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# ends of sentences and white space, on which tokens merge across the beginning of a response
words = st.lists(
    st.sampled_from(["red", "re", "a", "b", " ", "\n", "\n\n", "'tis", ":", "é", "日", "🙂", "."]),
    min_size=1,
    max_size=8,
).map("".join)


def records_of(*rows: Record) -> Records:
    return Records("mixed" if len({type(row) for row in rows}) > 1 else type(rows[0]).__name__.lower(), rows, "given")


def bytes_of(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    """The bytes a token stands for, from its spelling alone."""
    spelled = str(tokenizer.convert_ids_to_tokens(token))
    if spelled in ("<s>", "</s>"):
        return spelled.encode()
    if match := re.fullmatch("<0x(..)>", spelled):
        return bytes([int(match[1], 16)])
    if tokenizer.convert_tokens_to_ids("▁") not in (None, tokenizer.unk_token_id):
        return spelled.replace("▁", " ").encode()
    return bytes(BYTES_OF[letter] for letter in spelled)


def check_labels(tokenizer: PreTrainedTokenizerFast, row: Row, text: str, responses: list[str]) -> None:
    """Every token that holds a byte of a response, and no other, is labelled with its own id; the tokens spell the
    text.
    """
    wanted = [False] * len(text.encode())
    place = 0
    for response in responses:
        place = text.index("### Response:" + response + "</s>", place) + len("### Response:")
        begin, end = len(text[:place].encode()), len((text[:place] + response + "</s>").encode())
        wanted[begin:end] = [True] * (end - begin)
        place += len(response)
    spelled = [bytes_of(tokenizer, token) for token in row["input_ids"]]
    place = 0
    for token, piece, label in zip(row["input_ids"], spelled, row["labels"], strict=True):
        if not text.encode().startswith(piece, place):  # the space that sentencepiece puts before a piece of text
            assert piece.startswith(b" "), (piece, place)
            piece = piece[1:]
        assert text.encode().startswith(piece, place)
        assert label == (token if any(wanted[place : place + len(piece)]) else IGNORED)
        place += len(piece)
    assert place == len(text.encode())


def bos(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.bos_token or ""


@per_tokenizer
@given(instruction=words, given_input=st.one_of(st.just(""), words), output=words, prompt_on=st.booleans())
def test_loss_falls_on_the_response_and_its_end(
    tokenizer: PreTrainedTokenizerFast, instruction: str, given_input: str, output: str, prompt_on: bool
) -> None:
    row = encode(records_of(Instruction(instruction, given_input, output)), tokenizer, 10_000, prompt_on).rows[0]
    check_labels(
        tokenizer, row, bos(tokenizer) + full_prompt(instruction, given_input, prompt_on) + output + "</s>", [output]
    )
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    if tokenizer.bos_token:
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id


@per_tokenizer
@given(turns=st.lists(words, min_size=2, max_size=6), system=st.one_of(st.none(), words), prompt_on=st.booleans())
def test_ids_are_those_of_the_chat_template(
    tokenizer: PreTrainedTokenizerFast, turns: list[str], system: str | None, prompt_on: bool
) -> None:
    turns = turns[: len(turns) // 2 * 2]
    messages = [Message("system", system)] if system else []
    messages += [Message("assistant" if place % 2 else "user", turn) for place, turn in enumerate(turns)]
    row = encode(records_of(Chat(tuple(messages))), tokenizer, 10_000, prompt_on).rows[0]
    apply_to_tokenizer_(tokenizer, prompt_on)
    conversation = [{"role": turn.role, "content": turn.content} for turn in messages]
    assert row["input_ids"] == tokenizer.apply_chat_template(conversation)["input_ids"]
    check_labels(tokenizer, row, str(tokenizer.apply_chat_template(conversation, tokenize=False)), turns[1::2])


@per_tokenizer
@given(instruction=words, given_input=st.one_of(st.just(""), words))
def test_ids_at_inference_begin_with_bos_and_the_prompt(
    tokenizer: PreTrainedTokenizerFast, instruction: str, given_input: str
) -> None:
    ids = encode_prompt(tokenizer, instruction, given_input)
    head = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    text = b"".join(bytes_of(tokenizer, token) for token in ids[len(head) :]).decode()
    assert ids[: len(head)] == head and tokenizer.bos_token_id not in ids[len(head) :]
    assert text.removeprefix(" ") == full_prompt(instruction, given_input)
    trained = encode(records_of(Instruction(instruction, given_input, "Yes")), tokenizer, 10_000, True).rows[0]
    assert trained["input_ids"][: len(ids) - 1] == ids[:-1]
    apply_to_tokenizer_(tokenizer, prompt_on=True)
    conversation = [{"role": "user", "content": user_turn(instruction, given_input)}]
    assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"] == ids


def test_the_opening_is_a_prefix_of_every_prompted_example(tokenizer: PreTrainedTokenizerFast) -> None:
    head = opening_ids(tokenizer)
    assert (
        encode_prompt(tokenizer, "Name a colour.")[: len(head)]
        == head
        == encode_prompt(tokenizer, "\n\nred")[: len(head)]
    )
    spelled = b"".join(bytes_of(tokenizer, token) for token in head).decode().removeprefix("<s>").removeprefix(" ")
    assert spelled.startswith(collaborative_prompt(False).text) and (
        collaborative_prompt(False).text + "\n\n"
    ).startswith(spelled)


@per_tokenizer
@given(text=words)
def test_every_token_of_a_text_is_learned(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    row = encode(records_of(Text(text)), tokenizer, 1000, prompt_on=True).rows[0]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    assert (
        row["input_ids"]
        == row["labels"]
        == [*begin, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    )


@pytest.mark.parametrize("trims", [False, True], ids=["whole offsets", "trimmed offsets"])
@pytest.mark.parametrize("output", ["\n\nred", "'tis", " 7", "red", " red"])
def test_a_token_across_the_beginning_of_a_response_is_learned(trims: bool, output: str) -> None:
    tokenizer = byte_level(use_regex=False, adds_bos=False, trims=trims)
    row = encode(records_of(Instruction("Name a colour.", "", output)), tokenizer, 1000, prompt_on=False).rows[0]
    check_labels(tokenizer, row, "<s>" + full_prompt("Name a colour.", prompt_on=False) + output + "</s>", [output])
    first = next(label for label in row["labels"] if label != IGNORED)
    if output in ("\n\nred", "'tis", " 7"):
        assert b"Response:" in bytes_of(tokenizer, first), "guards this test: the token does lie across"


def test_texts_packed_make_one_stream(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [Text("The cat sat on the mat. " * n) for n in (1, 5, 2)]
    apart = encode(records_of(*texts), plain_tokenizer, 1000, prompt_on=False)
    packed = encode(records_of(*texts), plain_tokenizer, 16, prompt_on=False, pack=True)
    stream = [token for row in apart.rows for token in row["input_ids"]]
    assert [token for row in packed.rows for token in row["input_ids"]] == stream
    assert all(len(row["input_ids"]) == 16 for row in packed.rows[:-1]) and packed.stats.truncated == 0
    assert all(row["labels"] == row["input_ids"] for row in packed.rows)
    assert packed.stats.tokens == packed.stats.response_tokens == len(stream)


def test_packing_leaves_instructions_alone_and_keeps_the_order(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = records_of(Text("red " * 30), Instruction("a", "", "b"), Text("blue"))
    lone = encode(records_of(Instruction("a", "", "b")), plain_tokenizer, 64, prompt_on=False).rows[0]
    packed = encode(rows, plain_tokenizer, 64, prompt_on=False, pack=True).rows
    assert lone in packed and sum(IGNORED in row["labels"] for row in packed) == 1


def test_records_keep_their_order_across_batches(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Record] = [Text(str(n)) if n % 3 else Instruction(str(n), "", str(n)) for n in range(1300)]
    encoded = encode(records_of(*rows), plain_tokenizer, 200, prompt_on=False).rows
    texts = [plain_tokenizer.decode(row["input_ids"]) for row in encoded]
    assert all(text == f"<s>{n}</s>" if n % 3 else text.endswith(f"Response:{n}</s>") for n, text in enumerate(texts))


def test_cuts_are_counted_and_an_example_without_response_is_dropped(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt_length = len(encode_prompt(plain_tokenizer, "Name a colour.", prompt_on=False))
    rows = records_of(
        Instruction("Name a colour.", "", "red " * 50),
        Instruction("Name a colour. " * 20, "", "red"),
        Instruction("a", "", "b"),
        Instruction("a", "", ""),
    )
    encoded = encode(rows, plain_tokenizer, prompt_length + 3, prompt_on=False)
    assert len(encoded.rows[0]["input_ids"]) == prompt_length + 3
    stats = encoded.stats
    assert (stats.n, stats.truncated, stats.dropped, stats.empty, stats.rows) == (4, 2, 1, 1, 2)
    assert stats.tokens == sum(len(row["input_ids"]) for row in encoded.rows)
    assert stats.response_tokens == sum(label != IGNORED for row in encoded.rows for label in row["labels"])


def test_when_nothing_is_left_to_learn_the_cure_is_named(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = records_of(Instruction("Name a colour.", "", "red"))
    shortest = len(encode_prompt(plain_tokenizer, "Name a colour."))
    with pytest.raises(
        DataError, match=rf"1 lost their whole response \(the shortest prompt has {shortest} tokens\).*prompt off"
    ):
        encode(rows, plain_tokenizer, 16, prompt_on=True)
    with pytest.raises(DataError, match=r"2 records, 2 of them empty"):
        encode(records_of(Text(""), Instruction("a", "", "")), plain_tokenizer, 16, prompt_on=True)


def test_a_limit_takes_the_first_records_and_of_a_mix_some_of_each(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [Text(str(n)) for n in range(10)]
    firsts = encode(records_of(*texts), plain_tokenizer, 64, prompt_on=False, limit=3)
    assert [plain_tokenizer.decode(row["input_ids"]) for row in firsts.rows] == ["<s>0</s>", "<s>1</s>", "<s>2</s>"]
    mixed = encode(records_of(*texts, *[Instruction("a", "", "b")] * 10), plain_tokenizer, 64, prompt_on=False, limit=4)
    assert [IGNORED in row["labels"] for row in mixed.rows] == [False, False, True, True] and mixed.stats.n == 4


def test_windows_are_used_as_they_are(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(records_of(Window((5, 4, 3)), Window((0, 0, 0))), plain_tokenizer, 8, prompt_on=True)
    assert (
        [row["input_ids"] for row in encoded.rows] == [[5, 4, 3], [0, 0, 0]] == [row["labels"] for row in encoded.rows]
    )
    with pytest.raises(DataError, match=r"window 1 holds 3 ids, max_length is 2"):
        encode(records_of(Window((5, 4, 3))), plain_tokenizer, 2, prompt_on=True)


def test_padding_of_windows_is_taken_away(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.pad_token = "a"
    pad = plain_tokenizer.pad_token_id
    encoded = encode(records_of(Window((5, 4, pad, pad))), plain_tokenizer, 8, prompt_on=True)
    assert encoded.rows[0]["input_ids"] == [5, 4] and encoded.stats.tokens == 2
    with pytest.raises(DataError, match=r"window 1 is padding"):
        encode(records_of(Window((pad, pad, pad))), plain_tokenizer, 8, prompt_on=True)


def test_ids_outside_the_vocabulary_are_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(plain_tokenizer)
    with pytest.raises(DataError, match=rf"row 2 holds id {size}, the vocabulary has {size}"):
        encode(records_of(Window((1, 2)), Window((1, size))), plain_tokenizer, 8, prompt_on=True)
    with pytest.raises(DataError, match=r"the vocabulary has 10"):
        encode(records_of(Text("The cat")), plain_tokenizer, 8, prompt_on=True, vocab_size=10)


def test_a_tokenizer_without_an_end_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(records_of(Text("a")), plain_tokenizer, 8, prompt_on=True)


@pytest.mark.parametrize(("field", "value"), [("max_length", 1), ("limit", 0)])
def test_useless_bounds_are_refused(plain_tokenizer: PreTrainedTokenizerFast, field: str, value: int) -> None:
    bounds = {"max_length": 8, "limit": None} | {field: value}
    with pytest.raises(DataError, match=f"{field}={value}"):
        encode(records_of(Text("a"), Text("b")), plain_tokenizer, prompt_on=False, **bounds)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' +"
    " '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant'"
    " %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] +"
    " '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%"
    " endif %}"
)
SHIFTING = "{% for message in messages %}{{ loop.length ~ message['content'] }}{% endfor %}"


@pytest.fixture
def chat_tokenizer(plain_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    plain_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def with_template(template: str) -> PreTrainedTokenizerFast:
        plain_tokenizer.chat_template = template
        return plain_tokenizer

    return with_template


CONVERSATION = Chat(
    (
        Message("user", "Name a colour."),
        Message("assistant", "red"),
        Message("user", "red"),
        Message("assistant", "The cat"),
    )
)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["without marks", "with generation marks"])
@pytest.mark.parametrize("prompt_on", [False, True])
def test_a_chat_model_learns_in_its_own_template(
    chat_tokenizer: Callable[[str], PreTrainedTokenizerFast], template: str, prompt_on: bool
) -> None:
    tokenizer = chat_tokenizer(template)
    row = encode(records_of(CONVERSATION), tokenizer, 2000, prompt_on).rows[0]
    apply_to_tokenizer_(tokenizer, prompt_on)
    conversation = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION.messages]
    assert row["input_ids"] == tokenizer.apply_chat_template(conversation)["input_ids"]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "red<|im_end|>The cat<|im_end|>"
    assert row == encode(records_of(CONVERSATION), tokenizer, 2000, prompt_on).rows[0], (
        "the applied template changes nothing"
    )


def test_instructions_follow_a_chat_models_template(chat_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> None:
    tokenizer = chat_tokenizer(CHATML)
    row = encode(records_of(Instruction("Name a colour.", "warm", "red")), tokenizer, 2000, prompt_on=True).rows[0]
    before = encode_prompt(tokenizer, "Name a colour.", "warm")
    assert row["input_ids"][: len(before)] == before and set(row["labels"][: len(before)]) == {IGNORED}
    assert tokenizer.decode(before).endswith("Name a colour.\n\n### Input:\nwarm<|im_end|>\n<|im_start|>assistant\n")
    assert "###System Instruction:" in tokenizer.decode(before)


def test_a_template_that_rewrites_earlier_turns_is_refused(
    chat_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(DataError, match="does not render turn 2 as a continuation"):
        encode(records_of(CONVERSATION), chat_tokenizer(SHIFTING), 2000, prompt_on=False)
    with pytest.raises(DataError, match=r"refuses a conversation of \d turns: never"):
        encode(records_of(CONVERSATION), chat_tokenizer("{{ raise_exception('never') }}"), 2000, prompt_on=False)


@pytest.mark.parametrize("prompt_on", [False, True])
def test_a_template_that_moves_system_texts_gets_them_in_the_first_user_turn(
    chat_tokenizer: Callable[[str], PreTrainedTokenizerFast], prompt_on: bool
) -> None:
    tokenizer = chat_tokenizer(LAST_TURN)
    talk = Chat((Message("system", "Be short."), *CONVERSATION.messages))
    encoded = encode(records_of(talk), tokenizer, 2000, prompt_on)
    said = tokenizer.decode(encoded.rows[0]["input_ids"])
    first = said.index("[/INST]")
    assert "Be short." in said[:first] and said.count("Be short.") == 1
    learned = [label for label in encoded.rows[0]["labels"] if label != IGNORED]
    spoken = [turn.content for turn in talk.messages if turn.role == "assistant"]
    assert tokenizer.decode(learned) == "".join(f" {turn}</s>" for turn in spoken)
    (note,) = encoded.notes
    assert note.startswith("the model's chat template keeps no system text: ")
    assert ("the collaborative prompt" in note) == prompt_on and "the system texts of 1 conversation stand" in note
    if prompt_on:
        apply_to_tokenizer_(tokenizer, prompt_on=True)
        conversation = [{"role": turn.role, "content": turn.content} for turn in talk.messages]
        assert encoded.rows[0]["input_ids"] == tokenizer.apply_chat_template(conversation)["input_ids"]


LOCAL = os.environ.get("COMPRESSO_DATA")


@pytest.mark.skipif(not LOCAL, reason="COMPRESSO_DATA: no folder with real tokenizers")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok361", "tokenizer-llama2-32k"])
def test_real_tokenizers(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(LOCAL or "") / "models" / name)
    for output in ("red", " red", "\n\nred", "'tis red: é日🙂", "."):
        tokenizer.chat_template = None
        check_real(tokenizer, output)


def check_real(tokenizer: PreTrainedTokenizerFast, output: str) -> None:
    row = encode(records_of(Instruction("Name a colour.", "warm", output)), tokenizer, 4000, prompt_on=True).rows[0]
    check_labels(tokenizer, row, "<s>" + full_prompt("Name a colour.", "warm") + output + "</s>", [output])
    apply_to_tokenizer_(tokenizer, prompt_on=True)
    conversation = [
        {"role": "user", "content": user_turn("Name a colour.", "warm")},
        {"role": "assistant", "content": output},
    ]
    assert row["input_ids"] == tokenizer.apply_chat_template(conversation)["input_ids"]
    assert row["input_ids"].count(1) == 1


def test_what_was_asked_is_learned_where_that_is_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    """The ids stay; every one of them has its label."""
    asked = records_of(Instruction("Name two colours.", "", "red, blue"))
    alone, both = (encode(asked, tokenizer, 256, False, on_inputs=on).rows[0] for on in (False, True))
    assert both["input_ids"] == alone["input_ids"] == both["labels"]
    assert IGNORED in alone["labels"]
