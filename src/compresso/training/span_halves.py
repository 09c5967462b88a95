"""Where distillation compares two models that find answers: the distributions of first and last tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.training.distill_objective import Compared, Tokens, block_outputs


def both_ends(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """First and last token of every example, and the hidden states of all positions but padding."""
    labels = batch["labels"]
    return Compared(labels, torch.ones_like(labels, dtype=torch.bool), batch["attention_mask"].bool())


@dataclass(frozen=True)
class Spans:
    """A model that finds answers, whose first half is all of it.

    Args:
        model: without or with adapters in its layers.
        blocks: those of its layers whose outputs are wanted.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module] = ()

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits of each token to be the first and the last [batch, 2, seq], and the outputs of the blocks, each
        [batch, seq, hidden]; on the model's device.
        """
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        with block_outputs(self.blocks) as found:
            logits = logits_of(self.model, inputs)
        return logits.transpose(1, 2), list(found)

    def logits(self, last: Tensor) -> Tensor:
        """The same."""
        return last

    def parameters(self) -> Sequence[Tensor]:
        """None: the second half does nothing."""
        return ()

    def check(self) -> None:
        """Nothing can lie between the halves."""

    @property
    def reads_states(self) -> bool:
        """They are logits."""
        return False

    @property
    def outcomes(self) -> int:
        """Positions that there are."""
        return int(self.model.config.max_position_embeddings)

    @property
    def words(self) -> str:
        """What it decides among."""
        return "positions"
