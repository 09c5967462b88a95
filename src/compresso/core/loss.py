"""A loss as a value: what a model's logits are held against, and how many labels its mean is over.

Objectives and scores take one as an argument, so that any masks are trained and any units scored under any loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.asked import asked_logits
from compresso.core.losses import IGNORED, label_loss, masked_token_loss, next_token_loss, span_loss
from compresso.core.segments import ohem_loss

_NOWHERE = -1e4
"""A logit of no weight that every float dtype has."""


class TrainingLoss(Protocol):
    """What an objective minimises on a batch."""

    def __call__(self, model: Callable[..., object], batch: Mapping[str, Tensor], /) -> Tensor:
        """The loss [] of a model on a batch with labels."""
        ...


@dataclass(frozen=True)
class Loss:
    """A mean over the labels of a batch; called with a model and a batch, it is a `TrainingLoss`.

    Args:
        mean: logits, labels -> the mean loss [], float32. The first dimension of both is the examples, so that a slice
            of them gives the loss of some examples.
        terms: labels -> how many of them the mean is over.
        predicted: labels, attention mask -> labels without those that nothing but padding predicts.
        read: a model and a batch -> the logits and labels that `mean` takes where it is called with both, if not all of
            them are wanted.
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    terms: Callable[[Tensor], int]
    predicted: Callable[[Tensor, Tensor], Tensor] = lambda labels, _: labels
    read: Callable[[Callable[..., object], Mapping[str, Tensor]], tuple[Tensor, Tensor]] = lambda model, batch: (
        logits_of(model, batch),
        batch["labels"],
    )

    def __call__(self, model: Callable[..., object], batch: Mapping[str, Tensor], /) -> Tensor:
        """The loss [] of a model on a batch: what the model reads, and labels."""
        return self.mean(*self.read(model, batch))


def logits_of(model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
    """What a model says of a batch, whose labels it does not see.

    Of a model that finds answers, of each token to be the first and the last [batch, seq, 2]; padding is neither.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    result = model(**inputs, use_cache=False)
    if hasattr(result, "start_logits"):
        both = [getattr(result, name) for name in ("start_logits", "end_logits")]  # models of any library
        return torch.stack(both, -1).masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, _NOWHERE)
    logits = getattr(result, "logits")  # noqa: B009 - models of any library
    assert isinstance(logits, Tensor)
    return logits


def _next_tokens(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def _after_padding(labels: Tensor, attention_mask: Tensor) -> Tensor:
    predicting = functional.pad(attention_mask[:, :-1], (1, 0))
    return labels.masked_fill(predicting == 0, IGNORED)


def _labels(labels: Tensor) -> int:
    return int(torch.count_nonzero(labels != IGNORED))


NEXT_TOKEN = Loss(next_token_loss, _next_tokens, _after_padding)
"""Of a causal language model: labels [batch, seq], each predicted at the position before it."""
LABEL = Loss(label_loss, _labels)
"""Of a classifier: labels [batch], one an example."""
MASKED_TOKEN = Loss(masked_token_loss, _labels, read=partial(asked_logits, logits_of))
"""Of a masked language model: labels [batch, seq], each predicted where it stands."""
SPAN = Loss(span_loss, _labels)
"""Of a model that finds answers: labels [batch, 2], the first and the last token of each."""
PIXEL = Loss(ohem_loss, _labels)
"""Of a segmenter: labels [batch, height, width]; the hard ones among the pixels' losses."""
