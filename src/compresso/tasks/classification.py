"""Classification of texts and of pairs of texts: one label an example."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.loss import LABEL, Loss
from compresso.data.batches import Row
from compresso.errors import DataError
from compresso.tasks.base import register
from compresso.training.distill_objective import Compare, Whole, examples


@dataclass(frozen=True)
class Classification:
    """The task of encoders with a classifier over the whole text."""

    name: str = "classification"
    loss: Loss = LABEL
    compare: Compare = examples

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Whole:
        """The model whole: its logits are few."""
        return Whole(model, blocks)

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and, for pairs, token_type_ids, each [len(rows), longest]; labels [len(rows)];
        int64.

        Raises DataError: there are no rows, or a row is empty.
        """
        if not rows or not all(row["input_ids"] for row in rows):
            raise DataError(f"a batch of {len(rows)} rows, some of them empty; wanted at least one token a row")
        width = max(len(row["input_ids"]) for row in rows)
        gaps = [width - len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": torch.tensor([row["input_ids"] + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
            "labels": torch.tensor([row["labels"][0] for row in rows]),
        }
        types = [row.get("token_type_ids", [0] * len(row["input_ids"])) for row in rows]
        if any(map(any, types)):
            batch["token_type_ids"] = torch.tensor([one + [0] * gap for one, gap in zip(types, gaps, strict=True)])
        return batch


CLASSIFICATION = Classification()
register(CLASSIFICATION)
