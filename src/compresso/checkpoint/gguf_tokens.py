"""The tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja.

Two kinds are read: byte-level BPE ("gpt2" there), whose splitting before the merges is a name, and BPE as of
SentencePiece ("llama" there), whose merges follow from the pieces' scores. A name of splitting that is not known here
is refused: a guess would give other tokens and no error.

Unusual: what the format does not hold is taken to be as the model families have it. Qwen composes characters first
(NFC), Llama 3 and Tekken look a whole word up before its merges, and a piece-wise tokenizer puts its space before each
stretch of text between special tokens, as llama.cpp does.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.gguf_fields import Fields
from compresso.checkpoint.reasons import reason_of

log = logging.getLogger(__name__)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
SPLITS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digit", "bytes"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, "plain bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, "plain bytes"): "qwen2",
}
"""llama.cpp's names of the steps that split a text before the merges, of those that are written too."""
_TEKKEN = (
    f"{_OTHER}{_UPPER}*{_LOWER}+|{_OTHER}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
}
_STEPS = {name: steps for steps, name in SPLITS.items()} | {"tekken": (_TEKKEN, "plain bytes")}
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})
"""Names with which llama.cpp looks a whole word up before its merges, and begins a text with the first token."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"


def has_tokens(fields: Fields) -> bool:
    """Whether the file holds a tokenizer."""
    return fields.text("tokenizer.ggml.model", "none", whole=True) not in ("none", "no_vocab")


def write_tokenizer(fields: Fields, folder: Path, rows: int, context: int) -> None:
    """Write the tokenizer's files, with those ids that a generation needs.

    Args:
        fields: of the file.
        folder: where to.
        rows: of the embedding.
        context: the longest text.

    Raises:
        CheckpointError: if it is of a kind that is not read, or its parts do not fit together.
    """
    tokens = fields.texts("tokenizer.ggml.tokens")
    if tokens is None or len(tokens) > rows:
        raise fields.refuse(f"has {len(tokens or ())} tokens for an embedding of {rows} rows.")
    types = fields.integers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise fields.refuse(f"has {len(types)} types for {len(tokens)} tokens.")
    kind = fields.text("tokenizer.ggml.model", whole=True)
    if kind not in ("gpt2", "llama"):
        raise fields.refuse(
            f"has a tokenizer of kind '{kind[:40]}'; gpt2 (byte-level BPE) and llama (pieces) are read."
        )
    special = {name: _special(fields, name, tokens) for name in ("bos", "eos", "unknown", "padding")}
    try:
        built = _bytes(fields, tokens, types) if kind == "gpt2" else _pieces(fields, tokens, types, special["unknown"])
        _finish(fields, built, tokens, types, kind, special)
    except Exception as error:  # the tokenizers library raises plain Exception
        if type(error).__module__.startswith("compresso."):
            raise
        raise fields.refuse(f"has a tokenizer that cannot be built: {reason_of(error)}") from error
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{names[name]: tokens[number] for name, number in special.items() if number is not None},
    }
    write_text(folder / "tokenizer.json", built.to_str())
    write_text(folder / "tokenizer_config.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    if template := fields.text("tokenizer.chat_template", "", whole=True):
        write_text(folder / "chat_template.jinja", template)


def special_ids(fields: Fields) -> dict[str, int | list[int]]:
    """Ids that generation begins, ends and fills up with; a text ends at the end of a turn, too."""
    tokens = fields.texts("tokenizer.ggml.tokens") or []
    found = {name: _special(fields, name, tokens) for name in ("bos", "eos", "eot", "padding")}
    ends = [one for one in dict.fromkeys((found["eos"], found["eot"])) if one is not None]
    ids: dict[str, int | list[int]] = {}
    if found["bos"] is not None:
        ids["bos_token_id"] = found["bos"]
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if found["padding"] is not None:
        ids["pad_token_id"] = found["padding"]
    return ids


def _special(fields: Fields, name: str, tokens: Sequence[str]) -> int | None:
    """Id of a special token, if there is one."""
    key = f"tokenizer.ggml.{name}_token_id"
    if not fields.has(key, whole=True):
        return None
    number = fields.integer(key, whole=True)
    if number >= len(tokens):
        raise fields.refuse(f"has {number} as {key}, and {len(tokens)} tokens.")
    return number


def _vocabulary(fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Ids by text; rows of the embedding that no token was ever given are left out."""
    vocabulary: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED and text == f"[PAD{number}]":
            continue
        if text in vocabulary:
            raise fields.refuse(f"has the token {text[:40]!r} twice, as {vocabulary[text]} and {number}.")
        vocabulary[text] = number
    return vocabulary


def _bytes(fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Byte-level BPE."""
    name = fields.text("tokenizer.ggml.pre", "default", whole=True)
    steps = _STEPS.get(_ALIASES.get(name, name))
    if steps is None:
        raise fields.refuse(
            f"splits texts as '{name[:40]}' (tokenizer.ggml.pre), which is not known here; known: {', '.join(_STEPS)}."
        )
    merges = fields.texts("tokenizer.ggml.merges")
    if merges is None:
        raise fields.refuse("has no tokenizer.ggml.merges. Convert the model to GGUF again.")
    pairs = [(left, right) for left, _, right in (one.partition(" ") for one in merges)]
    built = Tokenizer(
        models.BPE(
            vocab=_vocabulary(fields, tokens, types),
            merges=pairs,
            ignore_merges=name in _WHOLE_WORDS,
            byte_fallback=False,
            fuse_unk=False,
        )
    )
    if steps == _STEPS["qwen2"]:
        built.normalizer = normalizers.NFC()
    elif fields.arch == "qwen2":
        log.warning(
            "%s: texts are split as '%s', and other readers of a qwen2 folder, transformers among them, split as Qwen",
            fields.header.path.name,
            name,
        )
    made = [_step(one) for one in steps]
    built.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    built.decoder = decoders.ByteLevel()
    return built


def _step(step: str) -> Any:
    """One step of splitting."""
    if step == "digit":
        return pre_tokenizers.Digits(individual_digits=True)
    if step in ("bytes", "plain bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes")
    return pre_tokenizers.Split(Regex(step), "isolated")


def _pieces(fields: Fields, tokens: Sequence[str], types: Sequence[int], unknown: int | None) -> Tokenizer:
    """BPE of pieces, which joins the neighbours whose union has the highest score."""
    scores = fields.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise fields.refuse(f"has {len(scores or ())} scores for {len(tokens)} tokens.")
    runs = [kind == _USER and text.strip(" ") == "" and text != "" for text, kind in zip(tokens, types, strict=True)]
    if any(runs):  # pieces of spaces alone have no score of use; all scores are then those of the pieces' order
        tokens = [_SPACE * len(text) if run else text for text, run in zip(tokens, runs, strict=True)]
        scores = [-float(number) for number in range(len(tokens))]
    vocabulary = _vocabulary(fields, tokens, types)
    joined = [kind == _NORMAL or run for kind, run in zip(types, runs, strict=True)]
    fallback = any(kind == _BYTE for kind in types)
    built = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, joined, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=fallback,
        )
    )
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True, whole=True)
    replace = normalizers.Replace(" ", _SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return built


def _merges(vocabulary: dict[str, int], joined: Sequence[bool], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two, those of the highest score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for text, number in vocabulary.items():
        for cut in range(1, len(text)) if joined[number] else ():
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None and joined[left] and joined[right]:
                found.append((-scores[number], left, right, text[:cut], text[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _finish(
    fields: Fields,
    built: Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    kind: str,
    special: dict[str, int | None],
) -> None:
    """Give a tokenizer its added tokens, and what texts begin and end with."""
    known = built.get_vocab(with_added_tokens=False)
    sorts = {
        text: sort
        for number, (text, sort) in enumerate(zip(tokens, types, strict=True))
        if text and known.get(text) == number and sort in (_CONTROL, _USER, _UNKNOWN)
    }
    built.add_special_tokens([AddedToken(text, normalized=False) for text, sort in sorts.items() if sort != _USER])
    built.add_tokens([AddedToken(text, normalized=False) for text, sort in sorts.items() if sort == _USER])
    before = kind == "llama" or fields.text("tokenizer.ggml.pre", "", whole=True) in _WHOLE_WORDS
    begins = special["bos"] if fields.flag("tokenizer.ggml.add_bos_token", before, whole=True) else None
    ends = special["eos"] if fields.flag("tokenizer.ggml.add_eos_token", False, whole=True) else None
    if begins is None and ends is None:
        return
    first, last = ([] if one is None else [(tokens[one], one)] for one in (begins, ends))
    around = [[text for text, _ in one] for one in (first, last)]
    built.post_processor = processors.TemplateProcessing(
        single=[*around[0], "$A", *around[1]],
        pair=[
            *around[0],
            "$A",
            *around[1],
            *(f"{one}:1" for one in around[0]),
            "$B:1",
            *(f"{one}:1" for one in around[1]),
        ],
        special_tokens=[*first, *last],
    )
