"""How a masked language model does on texts that no stage trained on, with the masks that they came with: the loss on
masked tokens, its perplexity, and the share of them that is guessed.

The perplexity is of 15 % of the tokens at once, each seen with the others masked. It is not the pseudo-perplexity of
Salazar et al. (arXiv 1910.14659), which masks one token after the other, and compares with nothing but itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.loss import MASKED_TOKEN
from compresso.core.losses import IGNORED
from compresso.core.row import Row
from compresso.metrics.by_length import Collate, examples_sha256, losses_by_length
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
    collate: Collate,
    batch_size: int = 16,
) -> MaskedScore:
    """What a masked language model says of masked examples, those of like length together; its mode is put back.

    Raises:
        DataError: no examples, or ids that the model does not have.
        NumericError: a loss is not finite.
    """
    check_ids(model, [row["input_ids"] for row in rows])
    right, tokens = [0] * len(rows), [0] * len(rows)

    def scores(places: Sequence[int], batch: dict[str, Tensor]) -> list[float]:
        logits, labels = MASKED_TOKEN.read(model, batch)
        losses = functional.cross_entropy(logits[0].float(), labels[0], reduction="none").double()
        hits, counts = logits[0].argmax(-1) == labels[0], (batch["labels"] != IGNORED).sum(1).tolist()
        for i, count, hit in zip(places, counts, hits.split(counts), strict=True):
            right[i], tokens[i] = int(hit.sum()), count
        return [float(lost.sum()) for lost in losses.split(counts)]

    nats = losses_by_length(model, rows, collate, batch_size, scores)
    return MaskedScore(HeldLoss(nats, tuple(tokens), examples_sha256(rows)), tuple(right))


def judge_masked(vocabulary: int, dense_loss: float | None, pruned_loss: float | None) -> Guard:
    """Whether a pruned masked language model is worth writing, by the thresholds of `metrics.guard` for the loss.

    They were set for next tokens; nothing published tells others for masked ones. Raises as `judge`.
    """
    found = judge(vocabulary=vocabulary, dense_loss=dense_loss, pruned_loss=pruned_loss)
    return Guard(verdict=found.verdict, checks=tuple(one for one in found.checks if one.name != "degenerate"))
