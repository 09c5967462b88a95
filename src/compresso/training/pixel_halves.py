"""Where distillation compares two segmenters: the logits of each pixel, in the size of the label maps, as the code of
arXiv 2309.02617 has it; pixels that are passed over are left out. The loss of labels beside it is the task's own, of
the hard pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.core.losses import IGNORED
from compresso.core.segments import at_labels, hard_pixels
from compresso.training.halves import Compared, Tokens, block_outputs


@dataclass(frozen=True)
class Pixels:
    """A segmenter. Its first half is all of it.

    Args:
        model: live.
        blocks: those of its stages whose outputs are wanted.
        outcomes: classes.
        words: what these are, in a word.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    outcomes: int
    words: str = "classes"

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits [batch, height, width, classes] in the size of the labels, and the outputs of the stages, each [batch,
        h, w, channels]; on the model's device.
        """
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        with block_outputs(self.blocks) as found:
            logits = at_labels(logits_of(self.model, inputs), inputs["labels"])
        return logits.movedim(1, -1), [one.movedim(1, -1) for one in found]

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


def pixels(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """Every pixel with a class, the feature maps of all pictures, and OHEM of the labels."""
    labels = batch["labels"]
    every = torch.ones(len(labels), dtype=torch.bool)
    return Compared(labels, labels != IGNORED, every, partial(hard_pixels, of=labels.numel()))
