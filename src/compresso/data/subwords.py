"""Which subwords a token is merged from, and how a token's text is encoded with the tokens that remain.

A tokenizer is read as the JSON that the tokenizers library writes. What may be removed from it so that every text
whose encoding used only kept tokens is encoded as before:

    BPE         No merge ever crossed a border between two tokens of the encoding: inside each, exactly those merges
                happened, in that order, that happen to the token alone. A token therefore needs the symbols of its own
                derivation, and nothing else. With these, every merge of the old encoding is still there, and it is
                still the first in rank.
    Unigram     The best path stays the best among fewer tokens. An unknown character costs 10 below the worst
                token, so that token is kept.
    WordPiece, WordLevel   The longest match that is there stays the longest. Nothing is needed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from compresso.errors import CheckpointError

State = Mapping[str, Any]
"""A tokenizer.json, parsed."""
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def vocabulary(state: State) -> dict[str, int]:
    """Token -> id of a tokenizer's model, without tokens that were only added."""
    vocab = state["model"]["vocab"]
    return {token: i for i, (token, _) in enumerate(vocab)} if state["model"]["type"] == "Unigram" else dict(vocab)


def check(state: State) -> None:
    """Raise CheckpointError for a tokenizer that cannot be cut without changing encodings."""
    model, cure = state["model"], "keep the vocabulary whole"
    if model.get("type") not in MODELS:
        raise CheckpointError(
            f"a tokenizer of type {model.get('type')} cannot be cut; known are {', '.join(MODELS)}: {cure}"
        )
    if model.get("dropout"):
        raise CheckpointError(
            f"a BPE tokenizer with dropout={model['dropout']} draws its encodings, so none could stay as it is; {cure}"
        )
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        raise CheckpointError(
            f"a BPE tokenizer with the continuing_subword_prefix '{model['continuing_subword_prefix']}' is not"
            f" understood; {cure}"
        )


def required(state: State) -> set[int]:
    """Ids that are kept whatever a text uses: added and unknown tokens, bytes or, where there are none, all single
    characters.
    """
    model, vocab = state["model"], vocabulary(state)
    ids = {int(token["id"]) for token in state["added_tokens"]}
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocab.get(model.get("unk_token") or "")
    if unknown is not None:
        ids.add(int(unknown))
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    if "ByteLevel" in _types(state.get("pre_tokenizer")) | _types(state.get("normalizer")):
        ids.update(vocab[token] for token in pre_tokenizers.ByteLevel.alphabet() if token in vocab)
    elif model.get("byte_fallback"):
        ids.update(vocab[token] for token in byte_tokens if token in vocab)
    elif model["type"] != "WordLevel":
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        ids.update(i for token, i in vocab.items() if len(token.removeprefix(prefix).removesuffix(suffix)) == 1)
    if model["type"] == "Unigram" and model["vocab"]:
        scores = [score for _, score in model["vocab"]]
        ids.add(scores.index(min(scores)))
    return ids


def constituents(state: State) -> Callable[[str], list[str]]:
    """A function from a token to the tokens that must be there for it to be merged, itself the last of them."""
    if state["model"]["type"] != "BPE":
        return lambda token: [token]
    derive = _deriving(state)

    def made_of(token: str) -> list[str]:
        seen, symbols = derive(token)
        return seen if symbols == [token] else [token]  # a token that merges never reach is its own only constituent

    return made_of


def encoder(state: State) -> Callable[[str], list[int] | None]:
    """A function from a token of another vocabulary to ids of this one for the same text; None where there are none."""
    model, vocab = state["model"], vocabulary(state)
    if model["type"] == "BPE":
        derive = _deriving(state)

        def encode(token: str) -> list[int] | None:
            ids: list[int] = []
            for symbol in derive(token)[1]:
                fallback = [f"<0x{byte:02X}>" for byte in symbol.encode()] if model.get("byte_fallback") else []
                found = [symbol] if symbol in vocab else fallback
                if not found or any(one not in vocab for one in found):
                    return None
                ids += [vocab[one] for one in found]
            return ids

        return encode
    if model["type"] == "WordPiece":
        return lambda token: _longest_first(token, vocab, model["continuing_subword_prefix"])
    if model["type"] == "WordLevel":
        return lambda token: None
    backend = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))

    def best_path(token: str) -> list[int] | None:
        ids = [token.id for token in backend.model.tokenize(token)]
        return None if model.get("unk_id") in ids else ids

    return best_path


def _deriving(state: State) -> Callable[[str], tuple[list[str], list[str]]]:
    """A function from a token to every symbol that BPE meets on the way, in order, and to the symbols that it ends
    with.
    """
    model = state["model"]
    suffix: str = model.get("end_of_word_suffix") or ""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merge_pairs(model["merges"]))))}

    def derive(token: str) -> tuple[list[str], list[str]]:
        symbols = list(token.removesuffix(suffix)) if suffix else list(token)
        if suffix and symbols and token.endswith(suffix):
            symbols[-1] += suffix
        seen = list(dict.fromkeys(symbols))
        while True:
            best = min(
                (ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(symbols, [*symbols[1:], ""], strict=True))
            )
            if best[0] >= len(ranks):
                return seen, symbols
            at = best[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            seen.append(symbols[at])

    return derive


def merge_pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write them as one string with a space."""
    return [
        (first, second) for first, second in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    ]


def _longest_first(token: str, vocab: Mapping[str, int], prefix: str) -> list[int] | None:
    """WordPiece: at each place the longest token that fits."""
    inside, rest = token.startswith(prefix), token.removeprefix(prefix)
    ids: list[int] = []
    while rest:
        length = next((n for n in range(len(rest), 0, -1) if (prefix if ids or inside else "") + rest[:n] in vocab), 0)
        if not length:
            return None
        ids.append(vocab[(prefix if ids or inside else "") + rest[:length]])
        rest = rest[length:]
    return ids


def _types(part: Any) -> set[str]:
    """The types of a pre-tokenizer, normalizer or post-processor and of all that it consists of."""
    if isinstance(part, Mapping):
        found = {str(part["type"])} if "type" in part else set[str]()
        return found.union(*(_types(value) for value in part.values() if isinstance(value, list | Mapping)))
    return set[str]().union(*(_types(one) for one in part)) if isinstance(part, list) else set()
