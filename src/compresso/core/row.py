"""An example as a model reads it."""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from torch import Tensor

from compresso.core.answer_window import AnswerWindow
from compresso.core.masking import Masking
from compresso.core.picture import Picture


class Row(TypedDict):
    """One example: its ids, and for each the label, which is the id itself or `data.batches.IGNORED`; of a classified
    text one label in all; of a question, where its answer begins and ends. Where it is known, the source it came from;
    of a pair of texts, which id belongs to which; of a masked text, how it was masked; of a question, what answers are
    read from; of a picture, its pixels, and no ids.
    """

    input_ids: list[int]
    labels: list[int]
    source: NotRequired[str]
    token_type_ids: NotRequired[list[int]]
    masking: NotRequired[Masking]
    window: NotRequired[AnswerWindow]
    picture: NotRequired[Picture]


def tokens_in(batch: Mapping[str, Tensor]) -> float:
    """How many tokens a batch has, padding left out; 0 of pictures.

    Args:
        batch: as a model takes it: `input_ids` [batch, seq], with or without `attention_mask` of the same shape.

    >>> import torch
    >>> tokens_in({"input_ids": torch.ones(2, 3)}), tokens_in({"pixel_values": torch.ones(1, 3, 4, 4)})
    (6.0, 0.0)
    """
    if "attention_mask" in batch:
        return float(batch["attention_mask"].sum())
    return float(batch["input_ids"].numel()) if "input_ids" in batch else 0.0
