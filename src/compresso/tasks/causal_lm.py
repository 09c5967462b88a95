"""Causal language modelling: the next token of texts and of responses."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.loss import NEXT_TOKEN, Loss
from compresso.data.batches import Row, collate
from compresso.tasks.base import DEFAULT, register
from compresso.training.distill_objective import Compare, Network, next_tokens


@dataclass(frozen=True)
class CausalLM:
    """The task of decoders."""

    name: str = DEFAULT
    loss: Loss = NEXT_TOKEN
    compare: Compare = next_tokens

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Network:
        """The model cut where logits are made."""
        return Network(model, blocks)

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each [len(rows), longest], int64."""
        batch = collate(rows, pad_id)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}


CAUSAL_LM = CausalLM()
register(CAUSAL_LM)
