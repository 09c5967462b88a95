"""The few things asked of a tokenizer, with plain types: ids, the characters they stand for, and the special tokens as
text.
"""

from bisect import bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.errors import DataError

Spans = list[tuple[int, int]]
"""Half-open character ranges of a text."""


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token as text; "" where the tokenizer has none."""
    return str(tokenizer.bos_token or "")


def eos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end-of-sequence token as text; "" where the tokenizer has none."""
    return str(tokenizer.eos_token or "")


def special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens by name, as a chat template sees them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}


def refuse_ids(ids: Sequence[int], size: int, what: str) -> None:
    """Raise DataError if one of the ids has no row in an embedding of `size`; `what` wrote them, in words."""
    if ids and not 0 <= (wrong := max(ids)) < size:
        raise DataError(
            f"{what} has the id {wrong}, and the embedding {size} rows; use the tokenizer that belongs to the model"
        )


def bare_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, nothing added."""
    if not texts:
        return []
    out = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]


def ids_and_ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The ids of each text, nothing added, and for each id the character after its last.

    Raises:
        DataError: the tokenizer cannot say which characters a token stands for.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not report the characters of its tokens; save it as a fast tokenizer"
            " (tokenizer.json)"
        )
    out = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(out["input_ids"], out["offset_mapping"], strict=True)  # pyright: ignore[reportArgumentType]
    return [(list(ids), [end for _, end in offsets]) for ids, offsets in pairs]


def label_spans(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Spans]) -> list[Row]:
    """Tokenise each text once and label the tokens that hold a character of one of its spans.

    Raises:
        DataError: the tokenizer cannot say which characters a token stands for.
    """
    rows: list[Row] = []
    for text, text_spans, (ids, ends) in zip(texts, spans, ids_and_ends(tokenizer, texts), strict=True):
        labels = [IGNORED] * len(ids)
        for begin, end in text_spans:
            first, last = bisect_right(ends, begin), bisect_right(ends, end)
            if first and ends[first - 1] == begin and _reaches_beyond(tokenizer, ids[first - 1], text, begin):
                first -= 1
            labels[first:last] = ids[first:last]
        rows.append(Row(input_ids=ids, labels=labels))
    return rows


def _reaches_beyond(tokenizer: PreTrainedTokenizerBase, token: int, text: str, begin: int) -> bool:
    """Whether a token that seems to end at `begin` holds white space after it, which byte-level tokenizers leave out of
    their offsets.
    """
    before, after = text[max(begin - 1, 0) : begin], text[begin : begin + 1]
    if not (after.isspace() and before.isascii() and before.strip()) or token in tokenizer.all_special_ids:
        return False
    return not str(tokenizer.convert_ids_to_tokens(token)).endswith(before)
