"""Padding adds nothing that a model could learn from or attend to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresso.core.row import Row
from compresso.data.batches import IGNORED, collate, pad_id
from compresso.errors import DataError

id_lists = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=4)


@given(id_lists, st.integers(0, 9), st.integers(1, 8))
def test_padding_is_on_the_right_and_masked_everywhere(lists: list[list[int]], pad: int, multiple: int) -> None:
    batch = collate([Row(input_ids=ids, labels=list(ids)) for ids in lists], pad, multiple)
    longest = max(map(len, lists))
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0 and longest <= width < longest + multiple
    assert all(tensor.dtype == torch.int64 and tensor.shape == (len(lists), width) for tensor in batch.values())
    for ids, row, mask, labels in zip(lists, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert row[mask.bool()].tolist() == ids == labels[: len(ids)].tolist()
        assert set(row[len(ids) :].tolist()) <= {pad}
        assert mask[: len(ids)].all() and (labels[len(ids) :] == IGNORED).all()


def test_no_rows_and_empty_rows_are_refused() -> None:
    with pytest.raises(DataError, match="0 rows"):
        collate([], 0)
    with pytest.raises(DataError, match="1 empty"):
        collate([Row(input_ids=[], labels=[]), Row(input_ids=[1], labels=[1])], 0)


def test_a_missing_pad_token_is_replaced_without_growing_the_vocabulary(plain_tokenizer) -> None:
    before = len(plain_tokenizer)
    assert pad_id(plain_tokenizer) == plain_tokenizer.eos_token_id and len(plain_tokenizer) == before
    plain_tokenizer.pad_token = "<unk>"
    assert pad_id(plain_tokenizer) == plain_tokenizer.unk_token_id
