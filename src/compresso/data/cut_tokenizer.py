"""A tokenizer without the tokens that are removed from a model, and rows of ids in its numbering.

Kept tokens keep their order and are numbered from 0, as the rows of the smaller embedding are. Merges that make or
need a removed token are removed too. Added and special tokens, the byte alphabet, normalizer, pre-tokenizer, decoder
and chat template are unchanged.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from compresso.core.row import Row
from compresso.data import subwords
from compresso.data.batches import IGNORED
from compresso.errors import CheckpointError


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer.

    Raises:
        CheckpointError: one that cannot be cut.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{type(tokenizer).__name__} runs in Python and cannot be cut; save it as a fast tokenizer (tokenizer.json)"
            " first"
        )
    state: dict[str, Any] = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    subwords.check(state)
    return state


def required_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may not be removed: special and added tokens, and the alphabet that any text can be written in."""
    return subwords.required(state_of(tokenizer)) | set(tokenizer.all_special_ids)


def cut(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int], size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of the tokens whose old ids are `kept`, numbered in this order from 0.

    A text whose encoding used only these is encoded as before; others are encoded with the tokens that remain.

    Args:
        tokenizer: unchanged.
        kept: old ids, ascending, of rows of the embedding; those that name no token are passed over.
        size: rows of the old embedding. Tokens that had no row keep having none.

    Returns:
        A new tokenizer.

    Raises:
        CheckpointError: the tokenizer cannot be cut, or a token is kept without all that it is merged from.
    """
    state = state_of(tokenizer)
    new = _numbers(kept, size)
    model = state["model"]
    vocab = subwords.vocabulary(state)
    remaining = {token: new(i) for token, i in vocab.items() if new(i) is not None}
    if missing := sorted(subwords.required(state) - {i for i in subwords.required(state) if new(i) is not None}):
        raise CheckpointError(
            f"the tokens with ids {missing[:8]} may not be removed from this tokenizer: they are special, or any text"
            " needs them"
        )
    made_of = subwords.constituents(state)
    for token in remaining:
        if lost := [part for part in made_of(token) if part not in remaining]:
            raise CheckpointError(
                f"token '{token}' is kept but '{lost[0]}', which it is merged from, is not; keep both or neither"
            )
    if model["type"] == "Unigram":
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in remaining]
        if model.get("unk_id") is not None:
            model["unk_id"] = new(model["unk_id"])
    else:
        model["vocab"] = dict(sorted(remaining.items(), key=lambda item: cast(int, item[1])))
    if model["type"] == "BPE":
        pairs = subwords.merge_pairs(model["merges"])
        model["merges"] = [list(pair) for pair in pairs if {*pair, "".join(pair)} <= remaining.keys()]
    for added in state["added_tokens"]:
        added["id"] = new(added["id"])
    if state.get("padding"):
        state["padding"]["pad_id"] = new(state["padding"]["pad_id"])
    _renumber_processor_(state.get("post_processor"), new)
    smaller = _reopened(tokenizer, state)
    expected = {token: new(i) for token, i in tokenizer.get_vocab().items() if new(i) is not None}
    if smaller.get_vocab() != expected:
        odd = sorted(set(smaller.get_vocab().items()) ^ set(expected.items()))[:2]
        raise CheckpointError(
            f"the tokenizer did not take its new numbers ({odd}); its ids have gaps, so keep the vocabulary whole"
        )
    return smaller


def _numbers(kept: Sequence[int], size: int) -> Callable[[int], int | None]:
    """A function from an old id to the new one; None for a removed token."""
    new = {old: i for i, old in enumerate(kept)}
    return lambda old: old - size + len(kept) if old >= size else new.get(old)


def _renumber_processor_(part: Any, new: Callable[[int], int | None]) -> None:
    """Give the special tokens that a post-processor adds their new ids."""
    if not isinstance(part, dict):
        return
    for one in part.get("processors", ()):
        _renumber_processor_(one, new)
    if part.get("type") == "TemplateProcessing":
        for token in part["special_tokens"].values():
            token["ids"] = [new(i) for i in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance(part.get(name), list):
            part[name] = [part[name][0], new(part[name][1])]


def _reopened(tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class with another tokenizer.json, as it will be when somebody opens its files."""
    changed = cast(Any, copy.deepcopy(tokenizer))
    changed._tokenizer = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    with tempfile.TemporaryDirectory(prefix="compresso-") as folder:
        changed.save_pretrained(folder)
        reopened = type(tokenizer).from_pretrained(folder, local_files_only=True)
    reopened.name_or_path = tokenizer.name_or_path
    return cast(PreTrainedTokenizerBase, reopened)


@dataclass(frozen=True)
class Translation:
    """From ids of a vocabulary to those of a smaller one.

    Args:
        kept: old ids of the kept tokens, ascending.
        encoded: old id of a removed token -> new ids for the same text; ids that are missing here have none.
    """

    kept: tuple[int, ...]
    encoded: Mapping[int, tuple[int, ...]]

    def rows(self, rows: Iterable[Row], longest: int | None = None) -> tuple[list[Row | None], int]:
        """Each row in the new numbering, None where a token has no ids in it, and how many rows were re-tokenised.

        Args:
            rows: in the old numbering.
            longest: tokens a row is cut to where it became longer.
        """
        new = {old: (i,) for i, old in enumerate(self.kept)} | dict(self.encoded)
        translated: list[Row | None] = []
        n_encoded = 0
        for row in rows:
            if any(i not in new for i in row["input_ids"]):
                translated.append(None)
                continue
            ids = [i for old in row["input_ids"] for i in new[old]]
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            labels = [i if label != IGNORED else IGNORED for old, label in pairs for i in new[old]]
            most = len(ids) if longest is None else max(longest, len(row["input_ids"]))
            translated.append(Row(input_ids=ids[:most], labels=labels[:most]))
            n_encoded += any(i in self.encoded for i in row["input_ids"])
        return translated, n_encoded


def translation(
    tokenizer: PreTrainedTokenizerBase | None, smaller: PreTrainedTokenizerBase | None, kept: Sequence[int]
) -> Translation:
    """How rows of a tokenizer are written with a smaller one made by `cut`; without tokenizers no removed token has
    ids in it.
    """
    if tokenizer is None or smaller is None:
        return Translation(tuple(kept), {})
    encode = subwords.encoder(state_of(smaller))
    staying = set(kept)
    found = {i: encode(token) for token, i in subwords.vocabulary(state_of(tokenizer)).items() if i not in staying}
    return Translation(tuple(kept), {i: tuple(ids) for i, ids in found.items() if ids})
