"""What was lost of the data is counted by source and reason; too much of it stops a run, with a cure that helps."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compresso.core.counted import survivors
from compresso.data import nano
from compresso.data.instructions import encode, encode_prompt
from compresso.data.records import Chat, Instruction, Message, Record, Records, Text, Window
from compresso.data.registry import load_records
from compresso.data.survival import Encoded, Lost, Reach, check_dropped, passed_over, told
from compresso.errors import DataError

SHORT = Instruction("Say a.", "", "a")
LONG = Instruction("Say a. " * 30, "", "a")
EMPTY = Instruction("Say a.", "", "")
LENGTH = 64
REFUSING = (
    "{% for message in messages %}{% if 'bad' in message['content'] %}{{ raise_exception('no such words\nplease') }}"
    "{% endif %}{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def nano_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(nano.path())


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[Record], **options: object) -> tuple[Records, Encoded]:
    records = Records("mixed", rows, "given")
    return records, encode(records, tokenizer, LENGTH, prompt_on=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lost", "stops"),
    [([], False), ([LONG] * 2, False), ([LONG, EMPTY], False), ([LONG] * 3, True), ([EMPTY] * 3, True)],
)
def test_a_run_stops_above_a_fifth(nano_tokenizer: PreTrainedTokenizerBase, lost: list[Record], stops: bool) -> None:
    records, found = encoded(nano_tokenizer, [*[SHORT] * (10 - len(lost)), *lost])
    reach = Reach(LENGTH, None)
    check_dropped(records, found, reach, allowed=True)
    if not stops:
        check_dropped(records, found, reach, allowed=False)
        return
    with pytest.raises(
        DataError, match=r"given: 3 of 10 examples would be dropped, more than 20%: 3 w.*--allow-dropped"
    ):
        check_dropped(records, found, reach, allowed=False)


def test_the_message_names_reasons_and_the_shortest_prompt(nano_tokenizer: PreTrainedTokenizerBase) -> None:
    records, found = encoded(nano_tokenizer, [SHORT, LONG, LONG, EMPTY])
    shortest = len(encode_prompt(nano_tokenizer, LONG.instruction, prompt_on=False))
    assert found.lost == (Lost("given", 4, no_room=2, empty=1, shortest_prompt=shortest),)
    sentences = told(records, found, LENGTH)
    assert sentences == [
        "given: 3 of 4 examples are dropped: 2 whose prompt leaves no room for a response in 64 tokens (the shortest"
        f" such prompt has {shortest}), 1 with an empty response"
    ]


def test_one_source_cannot_vanish_behind_a_larger_one(nano_tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[Record] = [*[Text("Once upon a time.")] * 95, *[LONG] * 5]
    records = Records("mixed", rows, "a + b", parts=(("a", 95), ("b", 5)))
    found = encode(records, nano_tokenizer, LENGTH, prompt_on=False)
    with pytest.raises(DataError, match=r"^b: 5 of 5 examples would be dropped"):
        check_dropped(records, found, Reach(LENGTH), allowed=False)


def test_texts_with_nothing_in_them_are_no_loss(nano_tokenizer: PreTrainedTokenizerBase) -> None:
    records, found = encoded(nano_tokenizer, [Text("")] * 9 + [Text("Once.")])
    check_dropped(records, found, Reach(LENGTH), allowed=False)
    assert (found.stats.empty, found.stats.blank, told(records, found, LENGTH)) == (9, 9, [])


def test_skipped_lines_count_as_dropped(nano_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("broken\n" * 3 + '{"text": "Once."}\n' * 10)
    records = load_records(path, skip_bad=True)
    found = encode(records, nano_tokenizer, LENGTH, prompt_on=False)
    with pytest.raises(
        DataError, match=r"a\.jsonl: 3 of 13 examples would be dropped.*: 3 bad lines\. Repair the data"
    ):
        check_dropped(records, found, Reach(LENGTH), allowed=False)
    assert told(records, found, LENGTH) == ["a.jsonl: 3 bad lines are skipped"]


@pytest.mark.parametrize(
    ("reach", "cure"),
    [
        (Reach(64), "raise max_length (--set data.max_length=N)"),
        (Reach(64, 128), "raise max_length (--set data.max_length=N)"),
        (
            Reach(64, 128, prompt_on=True),
            "raise max_length or turn the collaborative prompt off (--set data.max_length=N, --set data.prompt=false)",
        ),
        (Reach(64, 64), "give shorter examples; the model reads no more than 64 tokens"),
        (
            Reach(64, 64, prompt_on=True),
            "turn the collaborative prompt off or give shorter examples (--set data.prompt=false); the model reads no"
            " more than 64 tokens",
        ),
    ],
)
def test_the_cure_is_one_that_this_model_allows(reach: Reach, cure: str) -> None:
    assert reach.cure() == cure


def test_cut_examples_and_texts_are_said(nano_tokenizer: PreTrainedTokenizerBase) -> None:
    long = Instruction("Say a.", "", "a " * 200)
    records, found = encoded(nano_tokenizer, [long, Text("Once. " * 200)])
    whole = encode(records, nano_tokenizer, 10_000, prompt_on=False).stats.tokens
    assert found.stats.cut_tokens == whole - 2 * LENGTH
    assert told(records, found, LENGTH) == [
        f"2 examples are cut at 64 tokens, which takes {whole - 2 * LENGTH:,} tokens off"
    ]
    _, packed = encoded(nano_tokenizer, [Text("Once. " * 200)], pack=True)
    assert packed.stats.cut_tokens == 0 and packed.stats.tokens > LENGTH, "packed texts lose nothing, their end neither"


def test_a_limit_and_columns_passed_over_are_said(nano_tokenizer: PreTrainedTokenizerBase) -> None:
    over = {f"c{i}": 9 - i for i in range(10)}
    records = Records("instruction", [SHORT] * 9, "given", passed_over=over)
    found = encode(records, nano_tokenizer, LENGTH, prompt_on=False, limit=4)
    assert told(records, found, LENGTH) == [
        "4 of 9 records are looked at (data.limit)",
        f"columns passed over: {passed_over(records)}",
    ]
    assert passed_over(records).startswith("c0 (9 rows), c1 (8 rows)") and passed_over(records).endswith("and 2 more")


def test_survivors_of_counts_of_any_release() -> None:
    old = {"n": 10, "truncated": 3, "dropped": 1, "empty": 2, "rows": 7, "tokens": 70, "response_tokens": 7}
    assert survivors(old) == 7
    assert survivors({**old, "blank": 1, "refused": 1}) == 7
    assert survivors({}) == 0


def test_what_a_template_refuses_is_named_by_file_and_line_and_skipped_on_request(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain_tokenizer.chat_template = REFUSING
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"Say {'bad' if i == 4 else 'a'}.", "output": "a"} for i in range(9)]
    path.write_text("\n" + "\n".join(map(json.dumps, rows)))
    records = load_records(path)
    with pytest.raises(DataError, match=r"^a\.jsonl:6: .*refuses a conversation of 2 turns: no such words.*--skip-bad"):
        encode(records, plain_tokenizer, LENGTH, prompt_on=False)
    found = encode(records, plain_tokenizer, LENGTH, prompt_on=False, skip_bad=True)
    assert (found.stats.rows, found.stats.refused, found.lost[0].refused) == (8, 1, 1)
    assert found.bad[0].startswith("a.jsonl:6: ") and "\n" not in found.bad[0]
    assert "1 that the chat template refuses" in told(records, found, LENGTH)[0]
    other = Records("instruction", [Instruction("bad", "", "a")], "given")
    with pytest.raises(DataError, match=r"1 of them refused; the first: given: record 1: "):
        encode(other, plain_tokenizer, LENGTH, prompt_on=False, skip_bad=True)


def test_ready_windows_need_no_tokenizer() -> None:
    windows = Records("window", [Window((5, 4, 3)), Window((1, 2, 9))], "given")
    found = encode(windows, None, 8, prompt_on=True, vocab_size=10)
    assert [row["input_ids"] for row in found.rows] == [[5, 4, 3], [1, 2, 9]] == [row["labels"] for row in found.rows]
    with pytest.raises(DataError, match="row 2 holds id 9, the vocabulary has 9"):
        encode(windows, None, 8, prompt_on=True, vocab_size=9)
    with pytest.raises(DataError, match=r"no tokenizer to read texts with; give ready token windows"):
        encode(Records("text", [Text("a")], "given"), None, 8, prompt_on=True)


def test_an_end_token_without_a_row_is_named(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.add_special_tokens({"eos_token": "<end>"})
    size = len(plain_tokenizer) - 1
    talk = Chat((Message("user", "a"), Message("assistant", "b")))
    for row in (Text("a"), SHORT, talk):
        with pytest.raises(DataError, match=rf"holds id {size} \(the tokenizer's <end>\), the vocabulary has {size}"):
            encode(Records("mixed", [row], "given"), plain_tokenizer, LENGTH, prompt_on=False, vocab_size=size)
