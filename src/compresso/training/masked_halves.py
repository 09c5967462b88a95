"""Where distillation compares two masked language models, and one of them in halves: hidden states of all tokens, then
logits of chosen ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.losses import IGNORED
from compresso.errors import ArchError
from compresso.training.halves import Compared, Tokens, block_outputs, check_halves

_HEADS = (("cls",), ("lm_head",), ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"))
"""What lies behind the encoder, in order: BERT's, RoBERTa's, DistilBERT's."""


def masked_tokens(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """Tokens that are asked for, or all but padding; hidden states of all but padding."""
    labels, real = batch["labels"], batch["attention_mask"].bool()
    return Compared(labels, labels != IGNORED if tokens == "labelled" else real, real)


@dataclass(frozen=True)
class MaskedNetwork:
    """A masked language model in two halves: ids -> hidden states, hidden states -> logits.

    Args:
        model: without or with adapters in its layers.
        blocks: those of its layers whose outputs are wanted.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module] = ()

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the head reads [batch, seq, hidden], and the outputs of the blocks, each of that shape; on the model's
        device.
        """
        inputs = {name: value.to(self.model.device) for name, value in batch.items() if name != "labels"}
        with block_outputs(self.blocks) as found:
            last = self.model.base_model(**inputs).last_hidden_state
        return last, list(found)

    def head(self) -> tuple[nn.Module, ...]:
        """The modules behind the encoder, in order.

        Raises:
            ArchError: they are not those of a family that is known here.
        """
        known = dict(self.model.named_children())
        for names in _HEADS:
            if known.keys() >= set(names):
                return tuple(known[name] for name in names)
        raise ArchError(
            f"{type(self.model).__name__} has a head that nobody described ({', '.join(known)}); distil a BERT, RoBERTa"
            " or DistilBERT"
        )

    def logits(self, last: Tensor) -> Tensor:
        """Logits [n, vocab] of what the head reads [n, hidden]."""
        for module in self.head():
            last = module(last)
        return last

    def parameters(self) -> Sequence[Tensor]:
        """Those of the head, a decoder that is the embedding included."""
        return list(dict.fromkeys(parameter for module in self.head() for parameter in module.parameters()))

    def check(self) -> None:
        """Compare the two halves with the whole. Raises ArchError as `check_halves`."""
        check_halves(self.model, self)

    @property
    def reads_states(self) -> bool:
        """They are: no norm lies between the last layer and the head."""
        return True

    @property
    def outcomes(self) -> int:
        """Rows of the decoder."""
        decoder = self.model.get_output_embeddings()
        assert isinstance(decoder, nn.Module)
        weight = decoder.get_parameter("weight")
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0])

    @property
    def words(self) -> str:
        """What the head decides among."""
        return "tokens"
