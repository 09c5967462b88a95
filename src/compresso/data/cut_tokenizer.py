"""A tokenizer without the tokens that a model loses, and rows of ids in its numbering.

Tokens that stay keep their order and are numbered from 0, as the rows of the smaller embedding are. Merges that make or
need a token that is gone go too. Added and special tokens, the byte alphabet, normalizer, pre-tokenizer, decoder and
chat template stay as they are.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from compresso.data import pieces
from compresso.data.batches import IGNORED, Row
from compresso.errors import CheckpointError


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer. Raises CheckpointError for one that cannot be cut."""
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{type(tokenizer).__name__} runs in Python and cannot be cut; save it as a fast tokenizer (tokenizer.json)"
            " first"
        )
    state: dict[str, Any] = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    pieces.check(state)
    return state


def lasting_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may not leave: special and added tokens, and the alphabet that any text can be written in."""
    return pieces.lasting(state_of(tokenizer)) | set(tokenizer.all_special_ids)


def cut(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int], size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of the tokens whose old ids are `kept`, numbered in this order from 0.

    A text whose encoding used only these is encoded as before; others are spelled with what is left.

    Args:
        tokenizer: stays as it is.
        kept: old ids, ascending, of rows of the embedding; those that name no token are passed over.
        size: rows of the old embedding. Tokens that had no row keep having none.

    Raises CheckpointError if the tokenizer cannot be cut, or a token stays without all that it is made of.
    """
    state = state_of(tokenizer)
    new = _numbers(kept, size)
    model = state["model"]
    vocab = pieces.vocabulary(state)
    staying = {piece: new(i) for piece, i in vocab.items() if new(i) is not None}
    if gone := sorted(pieces.lasting(state) - {i for i in pieces.lasting(state) if new(i) is not None}):
        raise CheckpointError(
            f"the tokens with ids {gone[:8]} may not leave this tokenizer: they are special, or any text needs them"
        )
    made_of = pieces.makings(state)
    for piece in staying:
        if lost := [part for part in made_of(piece) if part not in staying]:
            raise CheckpointError(
                f"token '{piece}' stays but '{lost[0]}', which it is made of, does not; keep both or neither"
            )
    if model["type"] == "Unigram":
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in staying]
        if model.get("unk_id") is not None:
            model["unk_id"] = new(model["unk_id"])
    else:
        model["vocab"] = dict(sorted(staying.items(), key=lambda item: cast(int, item[1])))
    if model["type"] == "BPE":
        pairs = pieces.merge_pairs(model["merges"])
        model["merges"] = [list(pair) for pair in pairs if {*pair, "".join(pair)} <= staying.keys()]
    for token in state["added_tokens"]:
        token["id"] = new(token["id"])
    if state.get("padding"):
        state["padding"]["pad_id"] = new(state["padding"]["pad_id"])
    _renumber_processor_(state.get("post_processor"), new)
    smaller = _reopened(tokenizer, state)
    wanted = {piece: new(i) for piece, i in tokenizer.get_vocab().items() if new(i) is not None}
    if smaller.get_vocab() != wanted:
        odd = sorted(set(smaller.get_vocab().items()) ^ set(wanted.items()))[:2]
        raise CheckpointError(
            f"the tokenizer did not take its new numbers ({odd}); its ids have gaps, so keep the vocabulary whole"
        )
    return smaller


def _numbers(kept: Sequence[int], size: int) -> Callable[[int], int | None]:
    """A function from an old id to the new one; None for a token that leaves."""
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
        kept: old ids of the tokens that stay, ascending.
        spelled: old id of a token that left -> new ids that stand for the same text; ids that are missing here have no
            spelling.
    """

    kept: tuple[int, ...]
    spelled: Mapping[int, tuple[int, ...]]

    def rows(self, rows: Iterable[Row], longest: int | None = None) -> tuple[list[Row | None], int]:
        """Each row in the new numbering, None where a token has no spelling, and how many rows had tokens spelled anew.

        longest: tokens a row is cut to where spelling made it longer.
        """
        new = {old: (i,) for i, old in enumerate(self.kept)} | dict(self.spelled)
        translated: list[Row | None] = []
        n_spelled = 0
        for row in rows:
            if any(i not in new for i in row["input_ids"]):
                translated.append(None)
                continue
            ids = [i for old in row["input_ids"] for i in new[old]]
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            labels = [i if label != IGNORED else IGNORED for old, label in pairs for i in new[old]]
            most = len(ids) if longest is None else max(longest, len(row["input_ids"]))
            translated.append(Row(input_ids=ids[:most], labels=labels[:most]))
            n_spelled += any(i in self.spelled for i in row["input_ids"])
        return translated, n_spelled


def translation(
    tokenizer: PreTrainedTokenizerBase | None, smaller: PreTrainedTokenizerBase | None, kept: Sequence[int]
) -> Translation:
    """How rows of a tokenizer are written with a smaller one made by `cut`; without tokenizers no token that left has a
    spelling.
    """
    if tokenizer is None or smaller is None:
        return Translation(tuple(kept), {})
    spell = pieces.spelling(state_of(smaller))
    staying = set(kept)
    found = {i: spell(piece) for piece, i in pieces.vocabulary(state_of(tokenizer)).items() if i not in staying}
    return Translation(tuple(kept), {i: tuple(ids) for i, ids in found.items() if ids})
