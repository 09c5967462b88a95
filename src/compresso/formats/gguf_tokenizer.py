"""A Hugging Face fast tokenizer as the fields of a GGUF file.

llama.cpp has tokenizers of its own. Two kinds are written: byte-level BPE ("gpt2" there), whose splitting before the
merges llama.cpp knows by name only, and BPE with byte fallback as converted from SentencePiece ("llama" there), which
it redoes by the pieces' scores. A tokenizer that is neither, or splits in a way without a name here, is refused: a
guess would give other tokens and no error.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresso.errors import ExportError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("bytes",): "gpt-2",
    ("digit", "bytes"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, "plain bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, "plain bytes"): "qwen2",
}
"""llama.cpp's names of the steps that split a text before the merges."""


def add_tokenizer(writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write vocabulary, merges or scores, special tokens and chat template to a GGUF writer.

    Args:
        rows: of the embedding; token ids beyond the vocabulary become unused tokens.

    Raises ExportError if llama.cpp has no such tokenizer.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise ExportError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which gguf is written from. Save its fast form beside"
            " the model."
        )
    told = json.loads(inner.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"a {model['type']} tokenizer is not written to gguf; BPE is, byte-level or converted from SentencePiece."
        )
    pieces = bool(model.get("byte_fallback"))
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    tokens, types = _vocabulary(gguf.TokenType, told, rows, pieces)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(model["vocab"], merges, rows))
        writer.add_add_space_prefix(_prefixes_space(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(told))
        writer.add_token_list(tokens)
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _vocabulary(kinds: Any, told: Mapping[str, Any], rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and type of each of `rows` ids. Raises ExportError if there are more tokens than rows."""
    added = {entry["id"]: entry for entry in told["added_tokens"]}
    texts = {number: text for text, number in told["model"]["vocab"].items()} | {
        number: entry["content"] for number, entry in added.items()
    }
    if max(texts) >= rows:
        raise ExportError(
            f"token id {max(texts)} of the tokenizer has no row in the embedding of {rows}. Resize the embedding."
        )
    unknown = told["model"].get("unk_token")
    types = []
    for number in range(rows):
        text = texts.get(number)
        if text is None:
            kind = kinds.UNUSED
        elif pieces and text == unknown:
            kind = kinds.UNKNOWN
        elif number in added:
            kind = kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED
        elif pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        types.append(int(kind))
    return [texts.get(number, f"[PAD{number}]") for number in range(rows)], types


def _scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], rows: int) -> list[float]:
    """Minus the rank of the merge that makes each token; llama.cpp joins the neighbours whose union has the highest
    score.

    Raises ExportError where joining by score allows a merge that the list does not have.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    listed = set(merges)
    for text in ranks:
        for cut in range(1, len(text)):
            if text[:cut] in vocabulary and text[cut:] in vocabulary and (text[:cut], text[cut:]) not in listed:
                pair = f"'{text[:cut]}' with '{text[cut:]}'"
                raise ExportError(
                    f"the tokenizer does not merge {pair}, llama.cpp would: it was not converted from SentencePiece."
                )
    scores = [float(-len(merges))] * rows
    for text, rank in ranks.items():
        if text in vocabulary:
            scores[vocabulary[text]] = float(-rank)
    return scores


def _prefixes_space(told: Mapping[str, Any]) -> bool:
    """Whether a text begins with an added space."""
    text = json.dumps([told.get("normalizer"), told.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _split_name(told: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises ExportError if it has none here."""
    given = told.get("pre_tokenizer") or {}
    steps = []
    for step in given.get("pretokenizers", [given]):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append("bytes" if step.get("use_regex", True) else "plain bytes")
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append("digit")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append(str(kind))
    name = _SPLITS.get(tuple(steps))
    if name is None:
        raise ExportError(
            f"the tokenizer splits texts by {steps}, for which no name of llama.cpp is known; known:"
            f" {', '.join(_SPLITS.values())}."
        )
    return name


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids of the special tokens, whether texts begin or end with one, and the chat template."""
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
