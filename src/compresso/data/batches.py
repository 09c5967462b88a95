"""From tokenised rows to the tensors of a training step."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compresso.core.row import Row
from compresso.errors import DataError

IGNORED = -100
"""Label of a token that takes no part in the loss."""


class Batch(TypedDict):
    """input_ids, attention_mask and labels, each [batch, seq], int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pad_id(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> int:
    """An id to fill up with: the tokenizer's own, else its end token, else 0.

    Padding is masked in the attention and in the labels, so any id in the vocabulary will do. The authors' code adds a
    [PAD] token and grows the embedding by a row for it; here the embedding keeps its size. A padding token that was
    added to the tokenizer alone has no row, so it is passed by.

    size: rows of the embedding; None where every id of the tokenizer has one.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int) and (size is None or 0 <= candidate < size):
            return candidate
    return 0


def padding_note(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    """What to say where the tokenizer's padding token has no row in an embedding of `size`; "" where it has one."""
    own, used = tokenizer.pad_token_id, pad_id(tokenizer, size)
    if not isinstance(own, int) or own == used:
        return ""
    return (
        f"the padding token {tokenizer.pad_token!r} has the id {own}, and the embedding {size} rows: rows are filled up"
        f" with id {used} instead, which is masked"
    )


def collate(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> Batch:
    """Rows side by side, padded on the right to the longest of them, rounded up to a multiple.

    Raises:
        DataError: there are no rows, or a row is empty.
    """
    if not rows or not all(row["input_ids"] for row in rows):
        raise DataError(
            f"a batch of {len(rows)} rows with {sum(not row['input_ids'] for row in rows)} empty ones; wanted at least"
            " one token a row"
        )
    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // multiple) * multiple
    gaps = [width - len(row["input_ids"]) for row in rows]
    return Batch(
        input_ids=torch.tensor([row["input_ids"] + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
        attention_mask=torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
        labels=torch.tensor([row["labels"] + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)]),
    )


def encoder_inputs(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """What an encoder reads: input_ids, attention_mask and, where there are pairs of texts, token_type_ids, each
    [len(rows), longest], int64.

    Raises:
        DataError: there are no rows, or a row is empty.
    """
    if not rows or not all(row["input_ids"] for row in rows):
        raise DataError(f"a batch of {len(rows)} rows, some of them empty; wanted at least one token a row")
    width = max(len(row["input_ids"]) for row in rows)
    gaps = [width - len(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
    }
    types = [row.get("token_type_ids", [0] * len(row["input_ids"])) for row in rows]
    if any(map(any, types)):
        batch["token_type_ids"] = torch.tensor([one + [0] * gap for one, gap in zip(types, gaps, strict=True)])
    return batch
