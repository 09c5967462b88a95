"""Windows against a plain count, token by token, of what is predicted and from what; bytes against the text itself."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compresso.data import nano
from compresso.metrics.protocol import PerplexityProtocol
from compresso.metrics.windows import Stream, bytes_of_tokens, cut, streams, text_windows

TOKENIZER = AutoTokenizer.from_pretrained(nano.path())
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def protocol(**fields) -> PerplexityProtocol:
    return PerplexityProtocol(
        **{"corpus": "held", "split": "all", "joining": "tokens", "seq_len": 8, "bos": "none"} | fields
    )


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def by_hand(n: int, how: PerplexityProtocol, n_head: int) -> list[tuple[int, int]]:
    """(place of a predicted token in its stream, place of the first token that the model sees before it) for each, in
    order.
    """
    body = how.seq_len - n_head
    step = how.stride or body
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    for number, begin in enumerate(range(0, n, step)):
        if how.max_windows is not None and number >= how.max_windows:
            break
        window = range(begin, min(begin + body, n))
        if how.remainder == "dropped" and len(window) < body:
            break
        for place in window:
            if place not in seen and (n_head or place > begin):
                found.append((place, begin))
                seen.add(place)
        if not how.stride:
            seen |= set(window)
        if window.stop == n:
            break
    return found


@pytest.mark.parametrize("remainder", ["dropped", "kept"])
@pytest.mark.parametrize("max_windows", [None, 1, 2])
@pytest.mark.parametrize("bos", ["none", "window"])
def test_windows_predict_what_a_count_by_hand_does(remainder: str, max_windows: int | None, bos: str) -> None:
    for n, seq_len in product([0, 1, 2, 3, 7, 8, 9, 16, 17, 40], [2, 3, 8]):
        stream = Stream(list(range(100, 100 + n)), [1] * n)
        head = [BOS] if bos == "window" else []
        for stride in [None, *range(1, seq_len - len(head) + 1)]:
            how = protocol(seq_len=seq_len, stride=stride, remainder=remainder, max_windows=max_windows, bos=bos)
            made = list(cut(stream, how, head))
            found = []
            for window in made:
                assert window.ids[: len(head)] == head and len(window.ids) <= seq_len
                assert window.n_bytes == window.n_scored > 0 < window.first
                body = window.ids[len(head) :]
                assert body == list(range(body[0], body[0] + len(body)))
                found += [(one - 100, body[0] - 100) for one in window.ids[window.first :]]
            assert found == by_hand(n, how, len(head)), how


def test_overlapping_windows_predict_every_token_but_the_first_once() -> None:
    stream = Stream(list(range(100)), None)
    for stride in range(1, 9):
        made = list(cut(stream, protocol(stride=stride if stride < 8 else 7, remainder="kept"), []))
        assert [one for window in made for one in window.ids[window.first :]] == list(range(1, 100))
        assert all(window.n_bytes is None for window in made)


TEXTS = ["A cat.", "", "Two dogs ran."]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"joining": "blank line"}, [ids("A cat.\n\n\n\nTwo dogs ran.")]),
        ({"joining": "space"}, [ids("A cat.  Two dogs ran.")]),
        ({"joining": "space", "bos": "start"}, [[BOS, *ids("A cat.  Two dogs ran.")]]),
        ({"joining": "space", "bos": "tokenizer"}, [[BOS, *ids("A cat.  Two dogs ran.")]]),
        ({}, [ids("A cat.") + ids("Two dogs ran.")]),
        ({"bos": "window"}, [ids("A cat.") + ids("Two dogs ran.")]),
        ({"bos": "tokenizer"}, [[BOS, *ids("A cat."), BOS, BOS, *ids("Two dogs ran.")]]),
        ({"bos": "document", "eos": True}, [[BOS, *ids("A cat."), EOS, BOS, EOS, BOS, *ids("Two dogs ran."), EOS]]),
        ({"bos": "start", "group": 2}, [[BOS, *ids("A cat.")], [BOS, *ids("Two dogs ran.")]]),
        ({"joining": "separate", "eos": True}, [[*ids("A cat."), EOS], [EOS], [*ids("Two dogs ran."), EOS]]),
        ({"joining": "separate", "bos": "start"}, [[BOS, *ids("A cat.")], [BOS], [BOS, *ids("Two dogs ran.")]]),
    ],
)
def test_texts_are_joined_as_the_protocol_says(fields: dict[str, object], expected: list[list[int]]) -> None:
    made = list(streams(TOKENIZER, TEXTS, protocol(**fields)))
    assert [stream.ids for stream in made] == expected
    between = {"blank line": 4, "space": 2}.get(str(fields.get("joining")), 0)
    assert sum(sum(stream.n_bytes or []) for stream in made) == sum(map(len, TEXTS)) + between
    for stream in made:
        assert all((n == 0) == (one in (BOS, EOS)) for one, n in zip(stream.ids, stream.n_bytes or [], strict=True))


def test_no_texts_make_no_windows() -> None:
    assert text_windows(TOKENIZER, [], protocol()) == []
    assert text_windows(TOKENIZER, ["", ""], protocol(bos="start", remainder="kept")) == []


def test_a_bos_before_each_window_is_read_and_not_predicted() -> None:
    made = text_windows(TOKENIZER, ["A cat sat on the mat."], protocol(bos="window", seq_len=4, remainder="kept"))
    assert all(window.ids[0] == BOS and window.first == 1 for window in made)
    assert [one for window in made for one in window.ids[1:]] == ids("A cat sat on the mat.")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(), max_size=4), st.sampled_from(["separate", "tokens"]))
def test_the_bytes_of_all_tokens_are_those_of_the_text(texts: list[str], joining: str) -> None:
    made = list(streams(TOKENIZER, texts, protocol(joining=joining, bos="document", eos=True)))
    assert sum(sum(stream.n_bytes or []) for stream in made) == sum(len(text.encode()) for text in texts)
    assert all(n >= 0 for stream in made for n in stream.n_bytes or [])


def test_bytes_reach_from_the_end_of_the_token_before() -> None:
    assert bytes_of_tokens("", []) == []
    assert bytes_of_tokens("ab c", [2, 4]) == [2, 2]
    assert bytes_of_tokens("é€😀.", [1, 2, 3, 4]) == [2, 3, 4, 1]
    assert bytes_of_tokens("😀", [1, 1, 1, 1]) == [4, 0, 0, 0]
    assert bytes_of_tokens("a.\n\nb \n", [0, 1, 2, 5]) == [
        0,
        1,
        1,
        5,
    ]  # a special token first; dropped white space goes to who comes next
