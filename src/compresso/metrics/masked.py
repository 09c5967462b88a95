"""How a masked language model does on texts that no stage trained on, with the masks that they came with: the loss on
masked tokens, its perplexity, and the share of them that is guessed.

The perplexity is of 15 % of the tokens at once, each seen with the others masked. It is not the pseudo-perplexity of
Salazar et al. (arXiv 1910.14659), which masks one token after the other, and compares with nothing but itself.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.loss import MASKED_TOKEN
from compresso.core.losses import IGNORED
from compresso.data.batches import Row
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import check_ids
from compresso.metrics.guard import Guard, judge
from compresso.metrics.held import HeldLoss
from compresso.metrics.ratio import ratio_error
from compresso.metrics.record import Environment, Measurement

PERPLEXITY, ACCURACY = "held-masked/perplexity", "held-masked/acc"


@dataclass(frozen=True)
class MaskedScore:
    """What a masked language model said of examples.

    Args:
        loss: on their masked tokens, one number an example.
        right: masked tokens of each example that it guessed.
    """

    loss: HeldLoss
    right: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a masked token."""
        return self.loss.mean

    @property
    def accuracy(self) -> float:
        """The share of masked tokens that were guessed."""
        return sum(self.right) / sum(self.loss.tokens)

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """The perplexity, "held-masked/perplexity", and the accuracy, "held-masked/acc", of masked tokens; with `noise`
        also how far the perplexity differs between halves of the examples.
        """
        scored = "masked tokens, 15 % of each example, all at once"
        perplexities = [
            one.model_copy(
                update={
                    "name": one.name.replace("held/", "held-masked/"),
                    "protocol": {**one.protocol, "scored": scored},
                }
            )
            for one in self.loss.measurements(environment, corpus, noise=noise)
        ]
        shared: dict[str, Any] = {"unit": "share", "how": "measured", "n": sum(self.loss.tokens)}
        accuracy = Measurement(
            name=ACCURACY,
            value=self.accuracy,
            stderr=ratio_error(self.right, self.loss.tokens),
            protocol=dict(perplexities[0].protocol),
            environment=environment,
            **shared,
        )
        return (perplexities[0], accuracy, *perplexities[1:])


def masked_score(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    batch_size: int = 16,
) -> MaskedScore:
    """What a masked language model says of masked examples, those of like length together; its mode is put back.

    Raises:
        DataError: no examples, or ids that the model does not have.
        NumericError: a loss is not finite.
    """
    if not rows:
        raise DataError("0 held-out examples; give more data, or raise data.held")
    check_ids(model, [row["input_ids"] for row in rows])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    nats, right, tokens = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: value.to(model.device) for name, value in collate([rows[i] for i in chosen]).items()}
            logits, labels = MASKED_TOKEN.read(model, batch)
            losses = functional.cross_entropy(logits[0].float(), labels[0], reduction="none").double()
            hits, counts = logits[0].argmax(-1) == labels[0], (batch["labels"] != IGNORED).sum(1).tolist()
            parts = zip(chosen, counts, losses.split(counts), hits.split(counts), strict=True)
            for i, count, lost, hit in parts:
                nats[i], right[i], tokens[i] = float(lost.sum()), int(hit.sum()), count
    model.train(was_training)
    if not math.isfinite(math.fsum(nats)):
        raise NumericError(
            f"the loss on {len(rows)} held-out examples is not finite; the model overflows on it, use float32 or"
            " bfloat16"
        )
    digest = hashlib.sha256(repr([(list(row["input_ids"]), list(row["labels"])) for row in rows]).encode()).hexdigest()
    return MaskedScore(HeldLoss(tuple(nats), tuple(tokens), digest), tuple(right))


def judge_masked(vocabulary: int, dense_loss: float | None, pruned_loss: float | None) -> Guard:
    """Whether a pruned masked language model is worth writing, by the thresholds of `metrics.guard` for the loss.

    They were set for next tokens; nothing published tells others for masked ones. Raises as `judge`.
    """
    found = judge(vocabulary=vocabulary, dense_loss=dense_loss, pruned_loss=pruned_loss)
    return Guard(verdict=found.verdict, checks=tuple(one for one in found.checks if one.name != "degenerate"))
