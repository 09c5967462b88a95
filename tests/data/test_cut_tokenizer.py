"""Tokenizers without some of their tokens: text of kept tokens is encoded as before, all other text can still be
written.

The oracle is the old tokenizer: encodings must be the same tokens, and decoded text the same text. Small tokenizers of
every kind are trained here by the tokenizers library; real ones are read where COMPRESSO_DATA has them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compresso.core.row import Row
from compresso.data import nano, subwords
from compresso.data.batches import IGNORED
from compresso.data.cut_tokenizer import cut, required_ids, state_of, translation
from compresso.errors import CheckpointError

DOMAIN = "the cat sat on the mat and the other cat sat there too. " * 3
OTHER = "Quantum Zürich 字 dances, 1234 times!"
TRAINED_ON = [
    DOMAIN,
    OTHER,
    "a brown fox jumps over the lazy dog, then sings there and thinks of matters",
    "other others bother mothers",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>"]


def wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def bytes_bpe() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TRAINED_ON, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = wrapped(backend)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token + m['content'] }}<tool>{% endfor %}"
    return tokenizer


def suffix_bpe() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    backend.train_from_iterator(
        TRAINED_ON, trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    )
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        TRAINED_ON, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return wrapped(backend)


def word_piece() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=False),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TRAINED_ON, trainers.WordPieceTrainer(vocab_size=180, special_tokens=SPECIAL))
    backend.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    return wrapped(backend)


def word_level() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TRAINED_ON, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return wrapped(backend)


def real(name: str) -> PreTrainedTokenizerBase:
    if not (data := os.environ.get("COMPRESSO_DATA")):
        pytest.skip("COMPRESSO_DATA: no folder with real tokenizers")
    folder = Path(data) / "models" / name
    return GPT2Tokenizer.from_pretrained(folder) if name == "tokenizer-gpt2" else AutoTokenizer.from_pretrained(folder)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes_bpe": bytes_bpe,
    "suffix_bpe": suffix_bpe,
    "unigram": unigram,
    "word_piece": word_piece,
    "word_level": word_level,
    "nano": lambda: AutoTokenizer.from_pretrained(nano.path()),
    **{
        name: lambda name=name: real(name)  # type: ignore[misc]
        for name in ("tokenizer-gpt2", "tokenizer-llama2-32k", "stories260K", "babyllama-tok361")
    },
}
every_tokenizer = pytest.mark.parametrize("name", MAKERS)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def smaller(tokenizer: PreTrainedTokenizerBase, text: str = DOMAIN) -> tuple[PreTrainedTokenizerBase, list[int]]:
    state, ids = state_of(tokenizer), {*encoded(tokenizer, text), *required_ids(tokenizer)}
    vocab, made_of = subwords.vocabulary(state), subwords.constituents(state)
    kept = sorted({vocab[part] for token, i in vocab.items() if i in ids for part in made_of(token)} | ids)
    return cut(tokenizer, kept, len(tokenizer)), kept


@pytest.mark.slow
@every_tokenizer
def test_text_of_kept_tokens_is_encoded_as_before(name: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[name]()
    before = json.dumps(state_of(tokenizer))
    new, kept = smaller(tokenizer)
    assert len(new) == len(kept) < len(tokenizer)
    assert json.dumps(state_of(tokenizer)) == before, "the old tokenizer was changed"
    new.save_pretrained(tmp_path)
    for one in (new, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (DOMAIN, "the cat sat", "cat"):
            old = encoded(tokenizer, text)
            if set(old) <= set(kept):
                assert [kept[i] for i in encoded(one, text)] == old
                assert one.decode(encoded(one, text)) == tokenizer.decode(old)
        for special in ("bos_token", "eos_token", "unk_token", "pad_token"):
            assert getattr(one, special) == getattr(tokenizer, special)
            old_id, new_id = (getattr(t, f"{special}_id") for t in (tokenizer, one))
            assert old_id == (None if new_id is None else kept[new_id])


@pytest.mark.slow
@every_tokenizer
def test_whatever_was_encoded_with_kept_tokens_alone_still_is(name: str) -> None:
    """Words of all the texts, in any order: where the old encoding uses kept tokens only, it stays to the last id."""
    tokenizer = MAKERS[name]()
    new, kept = smaller(tokenizer)
    words = sorted({word for text in TRAINED_ON for word in text.split()})
    phrases = [
        *words,
        *(f"{a} {b}" for a, b in zip(words, reversed(words), strict=True)),
        "thethethe cataton mattt",
        "  the\n\ncat ",
    ]
    same = 0
    for phrase in phrases:
        old = encoded(tokenizer, phrase)
        if set(old) <= set(kept):
            assert [kept[i] for i in encoded(new, phrase)] == old, phrase
            same += 1
    assert same >= 3


@pytest.mark.slow
@every_tokenizer
def test_other_text_is_still_written(name: str) -> None:
    tokenizer = MAKERS[name]()
    new, kept = smaller(tokenizer)
    old = encoded(tokenizer, OTHER)
    assert not set(old) <= set(kept), "this test says nothing: no token left"
    if name != "word_level":  # where a word that left is unknown
        assert new.decode(encoded(new, OTHER)) == tokenizer.decode(old)
    (row,), n_spelled = translation(tokenizer, new, kept).rows([Row(input_ids=old, labels=[IGNORED, *old[1:]])])
    if name == "word_level":
        assert row is None and n_spelled == 0
        return
    assert row is not None and n_spelled == 1
    if tokenizer.unk_token_id not in old[1:]:
        assert new.decode(row["input_ids"], skip_special_tokens=True) == tokenizer.decode(old, skip_special_tokens=True)
    assert row["labels"][0] == IGNORED and row["labels"][-1] == row["input_ids"][-1]


def test_what_belongs_to_no_text_survives() -> None:
    tokenizer = bytes_bpe()
    new, kept = smaller(tokenizer)
    assert new.chat_template == tokenizer.chat_template
    said = [{"role": "user", "content": "the cat"}]
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    assert [kept[i] for i in new.apply_chat_template(said, return_dict=False)] == ids
    assert new.convert_tokens_to_ids("<tool>") == len(new) - 2 and new.decode([len(new) - 2]) == "<tool>"
    assert new("a", padding="max_length", max_length=9)["input_ids"][-1] == new.pad_token_id == len(new) - 1
    assert {new.decode([i]) for i in range(len(new))} <= {tokenizer.decode([i]) for i in range(len(tokenizer))}
    merges = [tuple(pair) for pair in state_of(new)["model"]["merges"]]
    assert all({a, b, a + b} <= new.get_vocab().keys() for a, b in merges)
    assert merges == [pair for pair in map(tuple, state_of(tokenizer)["model"]["merges"]) if pair in set(merges)], (
        "the order is kept"
    )


def test_a_token_that_is_made_in_two_ways_needs_one_of_them() -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc", "d"])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    state = json.loads(backend.to_str())
    assert subwords.constituents(state)("abc") == ["a", "b", "c", "ab", "abc"]
    new = cut(wrapped(backend, bos_token="<unk>", eos_token="<unk>"), [0, 1, 2, 3, 4, 6, 7], 8)
    assert new.tokenize("abcd") == ["abc", "d"] and new.tokenize("dbc") == ["d", "b", "c"]


def test_a_row_is_cut_only_where_spelling_made_it_too_long() -> None:
    tokenizer = bytes_bpe()
    new, kept = smaller(tokenizer)
    ids = encoded(tokenizer, OTHER)
    (row, plain), _ = translation(tokenizer, new, kept).rows(
        [Row(input_ids=ids, labels=ids), Row(input_ids=kept[:3], labels=kept[:3])], longest=len(ids)
    )
    assert row is not None and len(row["input_ids"]) == len(row["labels"]) == len(ids)
    assert plain == {"input_ids": [0, 1, 2], "labels": [0, 1, 2]}


def test_without_a_tokenizer_rows_with_a_removed_token_go() -> None:
    rows = [Row(input_ids=[3, 5], labels=[3, 5]), Row(input_ids=[3, 4], labels=[3, 4])]
    assert translation(None, None, [3, 5]).rows(rows) == ([{"input_ids": [0, 1], "labels": [0, 1]}, None], 0)


def _changed(**model: Any) -> PreTrainedTokenizerBase:
    state = json.loads(bytes_bpe().backend_tokenizer.to_str())  # type: ignore[attr-defined]
    state["model"] |= model
    return wrapped(Tokenizer.from_str(json.dumps(state)))


def test_tokenizers_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"dropout=0\.5 draws its encodings"):
        state_of(_changed(dropout=0.5))
    with pytest.raises(CheckpointError, match="continuing_subword_prefix '##'"):
        subwords.check({"model": {"type": "BPE", "continuing_subword_prefix": "##"}})
    with pytest.raises(CheckpointError, match="a tokenizer of type Lexicon cannot be cut; known are BPE"):
        subwords.check({"model": {"type": "Lexicon"}})

    class Slow:
        is_fast = False

    with pytest.raises(CheckpointError, match="Slow runs in Python and cannot be cut"):
        state_of(Slow())  # type: ignore[arg-type]


def test_cuts_that_break_a_tokenizer_are_refused() -> None:
    tokenizer = bytes_bpe()
    _, kept = smaller(tokenizer)
    with pytest.raises(CheckpointError, match=r"ids \[0\] may not be removed"):
        cut(tokenizer, kept[1:], len(tokenizer))
    parts = subwords.constituents(state_of(tokenizer))("Ġthe")
    part = next(one for one in parts[:-1] if len(one) > 1)
    with pytest.raises(CheckpointError, match="which it is merged from, is not"):
        cut(tokenizer, [i for i in kept if i != tokenizer.get_vocab()[part]], len(tokenizer))
