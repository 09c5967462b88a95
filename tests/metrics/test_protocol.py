"""Protocols: the literature's decisions field by field, and the contradictions that are refused."""

from dataclasses import replace
from typing import Any

import pytest

from compresso.errors import DataError
from compresso.metrics.perplexity import PRESETS, PerplexityProtocol, check_context, every_token, preset


def test_the_presets_are_those_of_the_literature() -> None:
    assert set(PRESETS) == {"sparsegpt", "llm-pruner", "compresso"}
    assert [one.seq_len for one in PRESETS.values()] == [2048, 128, 1024]
    for one in PRESETS.values():
        assert (one.corpus, one.split, one.remainder, one.stride, one.bos, one.eos) == (
            "wikitext2",
            "test",
            "dropped",
            None,
            "tokenizer",
            False,
        )
    assert [one.joining for one in PRESETS.values()] == ["blank line", "blank line", "tokens"]
    assert PRESETS["compresso"].group == 1000


def test_c4_is_joined_by_spaces_and_cut_off() -> None:
    c4 = preset("sparsegpt", "c4")
    assert (c4.split, c4.joining, c4.documents, c4.max_windows, c4.seq_len) == ("validation", "space", 1100, 256, 2048)
    assert preset("llm-pruner", "c4").joining == "blank line"


def test_a_preset_takes_another_length_corpus_and_split() -> None:
    assert preset("sparsegpt", seq_len=256) == replace(PRESETS["sparsegpt"], seq_len=256)
    other = preset("compresso", "notes", max_windows=3)
    assert (other.corpus, other.split, other.max_windows) == ("notes", "all", 3)
    assert preset("sparsegpt", "wikitext2", "train").split == "train"
    with pytest.raises(DataError, match="did you mean 'sparsegpt'"):
        preset("sparse-gpt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": ""}, "corpus=''"),
        ({"split": ""}, "split=''"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"stride": 0}, "stride=0.*1 to 8"),
        ({"stride": 9}, "stride=9.*1 to 8"),
        ({"stride": 8, "bos": "window"}, "1 to 7"),
        ({"joining": "blank lines"}, "did you mean 'blank line'"),
        ({"bos": "begin"}, "bos='begin'"),
        ({"remainder": "keep"}, "did you mean 'kept'"),
        ({"averaging": "window"}, "did you mean 'windows'"),
        ({"joining": "space", "eos": True}, "joining='tokens'"),
        ({"joining": "blank line", "bos": "document"}, "joining='tokens'"),
        ({"joining": "separate", "group": 4}, "group=4"),
        ({"group": 0}, "group=0"),
        ({"documents": 0}, "documents=0"),
        ({"max_windows": 0}, "max_windows=0"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {"corpus": "held", "split": "all", "joining": "tokens", "seq_len": 8}
    PerplexityProtocol(**sound)
    with pytest.raises(DataError, match=message):
        PerplexityProtocol(**sound | fields)


def test_settings_tell_every_field() -> None:
    told = every_token("world", "fresh", 256).settings()
    assert set(told) == set(PerplexityProtocol.__dataclass_fields__)
    assert (told["bos"], told["eos"], told["remainder"], told["stride"]) == ("document", True, "kept", "no overlap")
    assert replace(every_token("world", "fresh", 256), stride=64).settings()["stride"] == 64


def test_a_window_longer_than_the_context_is_refused_with_the_cure() -> None:
    check_context(PRESETS["sparsegpt"], None)
    check_context(PRESETS["sparsegpt"], 2048)
    with pytest.raises(
        DataError, match=r"2048 tokens at once.*made for 512; choose --protocol llm-pruner, or give seq_len=512"
    ):
        check_context(PRESETS["sparsegpt"], 512)
    with pytest.raises(DataError, match=r"made for 64; give seq_len=64"):
        check_context(PRESETS["llm-pruner"], 64)
