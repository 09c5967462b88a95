"""Rows of masked language modelling: a text's tokens as a model sees them, and what was there before.

A row knows how it was masked (`Row["masking"]`), so that it can be masked anew in every pass over the data, as in
RoBERTa (arXiv 1907.11692, section 4.1). As it is read, its masks depend on the text alone: held-out examples ask every
model, in every run, for the same tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from compresso.core.masking import Masking, masked, own_seed
from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.data.columns import take
from compresso.data.record_forms import BadRecord, RecordForm, Taken, UnknownFields
from compresso.data.records import Records, Text, kind_of
from compresso.data.survival import Encoded, Lost, Stats
from compresso.errors import DataError

_TOGETHER = 512  # texts tokenised in one call
_LEAST = 3  # tokens of a row: a beginning, one to be asked for, an end
_WANTED = "text, content or sentence, which hold plain text"


def take_text(value: object) -> Taken:
    """The plain text that `value` describes, and the columns that were not read. Raises BadRecord."""
    try:
        taken = take(value)
    except UnknownFields as error:  # of all that `take` reads, this task takes plain text alone
        raise UnknownFields(error.found, _WANTED) from error
    if not isinstance(taken.record, Text):
        raise BadRecord(f"holds a record of kind {kind_of(taken.record)}; wanted {_WANTED}")
    return taken


PLAIN = RecordForm(("text", "content", "sentence"), take_text, _WANTED)
"""Rows of plain text."""


def masking_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Masking:
    """How texts of a tokenizer are masked.

    Args:
        tokenizer: with a mask.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: it has no mask, or one that the model has no row for.
    """
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise DataError(
            "the tokenizer has no mask token, so nothing can be masked; give the tokenizer of a masked language model,"
            " or add mask_token to its files"
        )
    if mask >= vocab_size:
        raise DataError(
            f"the tokenizer's mask token {tokenizer.mask_token!r} has the id {mask}, the vocabulary has {vocab_size};"
            " use the tokenizer that belongs to the model"
        )
    return Masking(mask, min(len(tokenizer), vocab_size), tuple(sorted({*map(int, tokenizer.all_special_ids), mask})))


def drawn(ids: Sequence[int], masking: Masking, seed: int) -> Row:
    """A row of these ids, masked by a seed. Raises ValueError if none of them may be masked."""
    seen, labels = masked(ids, masking, seed)
    return Row(input_ids=seen, labels=labels, masking=masking)


def redrawn(row: Row, seed: int) -> Row:
    """The row with other masks on the same text."""
    assert "masking" in row  # rows of this task have it
    whole = [seen if label == IGNORED else label for seen, label in zip(row["input_ids"], row["labels"], strict=True)]
    return Row(**{**row, **drawn(whole, row["masking"], seed)})


def encode_masked(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pack: bool = False,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Encoded:
    """Tokenise texts with the tokenizer's own special tokens, and mask them.

    Args:
        records: plain texts.
        tokenizer: with a mask.
        max_length: most tokens of a row; what a text has beyond them is cut, or begins the next row.
        pack: texts one behind the other, an end token behind each, cut into full rows.
        limit: most records, evenly spaced ones.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: no mask, ids outside the vocabulary, rows of no room, or nothing to learn in them.
    """
    size = len(tokenizer) if vocab_size is None else vocab_size
    masking = masking_of(tokenizer, size)
    if max_length < _LEAST:
        raise DataError(f"max_length={max_length}: wanted at least {_LEAST}, for two special tokens and one to guess")
    n = len(records.rows)
    places = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    sources = [name for name, part in records.by_source() for _ in part]
    rows: list[Row] = []
    lost: list[Lost] = []
    truncated = cut = blank = 0
    for source in dict.fromkeys(sources):
        texts = [row.text for i in places if sources[i] == source and isinstance(row := records.rows[i], Text)]
        written = [text for text in texts if text.strip()]
        blank += len(texts) - len(written)
        given = len(written)
        for ids, beyond in _packed(written, tokenizer, max_length) if pack else _cut(written, tokenizer, max_length):
            truncated, cut = truncated + (beyond > 0), cut + beyond
            if masking.maskable(ids):
                rows.append(Row(**{**drawn(ids, masking, own_seed(ids)), "source": source}))
            else:
                given -= 1
        lost.append(Lost(source, len(texts), empty=0 if pack else len(written) - given))
    highest = max((max(_whole(row)) for row in rows), default=0)
    if highest >= size:
        raise DataError(
            f"{records.source}: the tokenizer gives id {highest}, the vocabulary has {size}; use the tokenizer that"
            " belongs to the model"
        )
    if not rows:
        raise DataError(
            f"{records.source}: nothing to guess in {len(places)} records, {blank} of them empty; give data with text"
        )
    stats = Stats(
        n=len(places),
        truncated=truncated,
        dropped=0,
        empty=blank + sum(one.empty for one in lost),
        rows=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        response_tokens=sum(label != IGNORED for row in rows for label in row["labels"]),
        blank=blank,
        cut_tokens=cut,
        read=n,
    )
    return Encoded(rows, stats, lost=tuple(lost))


def _whole(row: Row) -> list[int]:
    """What is seen, and what is asked for."""
    return [*row["input_ids"], *row["labels"]]


def _cut(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[tuple[list[int], int]]:
    """Ids of each text, no more than `length`, and how many it has beyond them."""
    left = iter(texts)
    while some := list(islice(left, _TOGETHER)):
        made, whole = tokenizer(some, truncation=True, max_length=length), tokenizer(some, verbose=False)
        for ids, all_ids in zip(made["input_ids"], whole["input_ids"], strict=True):
            yield list(ids), len(all_ids) - len(ids)


def _packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[tuple[list[int], int]]:
    """Full rows of the texts one behind the other, between beginning and end token; the last may be shorter."""
    begin = [tokenizer.cls_token_id] if isinstance(tokenizer.cls_token_id, int) else []
    end = [tokenizer.sep_token_id] if isinstance(tokenizer.sep_token_id, int) else []
    room = length - len(begin) - len(end)
    stream: list[int] = []
    left = iter(texts)
    while some := list(islice(left, _TOGETHER)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*([] if not stream else end), *ids]
            while len(stream) >= room:
                yield [*begin, *stream[:room], *end], 0
                stream = stream[room:]
    if stream:
        yield [*begin, *stream, *end], 0
