"""The loss on examples that no stage trained on, one number an example, so that it comes with its standard error.

Labels follow training: of an instruction only the response counts, of plain text every token.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compresso.core.losses import IGNORED
from compresso.core.row import Row
from compresso.errors import DataError, NumericError
from compresso.metrics.forward import window_logits
from compresso.metrics.ratio import ratio_error
from compresso.metrics.record import Environment, Measurement

SPLITS = 99
"""Random halvings of the examples behind a noise floor."""


@dataclass(frozen=True)
class HeldLoss:
    """Losses of held-out examples.

    Args:
        nats: summed over the labelled tokens of each example.
        tokens: labelled tokens of each.
        examples_sha256: of their ids and labels; the same ones have the same.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    examples_sha256: str

    @property
    def mean(self) -> float:
        """Nats a labelled token."""
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean (a ratio of sums over independent examples); None for a single example."""
        return ratio_error(self.nats, self.tokens)

    def half_split(self, splits: int = SPLITS) -> float | None:
        """How far the perplexities of two random halves of the examples lie apart, the median over `splits`; None for a
        single example.
        """
        if len(self.nats) < 2:
            return None
        generator = torch.Generator().manual_seed(0)
        apart: list[float] = []
        for _ in range(splits):
            order = torch.randperm(len(self.nats), generator=generator).tolist()
            one, other = (self._of(order[i::2]) for i in (0, 1))
            apart.append(abs(_perplexity(one.mean) - _perplexity(other.mean)))
        return statistics.median(apart)

    def _of(self, chosen: Sequence[int]) -> "HeldLoss":
        return HeldLoss(
            tuple(self.nats[i] for i in chosen), tuple(self.tokens[i] for i in chosen), self.examples_sha256
        )

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """The number "held/perplexity", and with `noise` "noise/held/perplexity": how far it differs between halves of
        the examples.
        """
        shared: dict[str, Any] = {"unit": "1", "how": "measured", "n": sum(self.tokens), "environment": environment}
        protocol = {
            "corpus": corpus,
            "examples": len(self.nats),
            "scored": "labelled tokens, as in training",
            "examples_sha256": self.examples_sha256[:16],
        }
        value = _perplexity(self.mean)
        spread = None if self.stderr is None else value * self.stderr
        found = [Measurement(name="held/perplexity", value=value, stderr=spread, protocol=protocol, **shared)]
        if noise and (apart := self.half_split()) is not None:
            drawn = {**protocol, "noise": "half-split", "splits": SPLITS}
            found.append(Measurement(name="noise/held/perplexity", value=apart, protocol=drawn, seed=0, **shared))
        return tuple(found)


def held_loss(
    model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 8, counted_as: Sequence[Row] | None = None
) -> HeldLoss:
    """Losses of examples {"input_ids", "labels"}; the token at s + 1 is predicted from those up to s, -100 carries no
    loss.

    counted_as: the same examples in another model's tokens, whose number the losses are shared out over: then both
    models' numbers are about the same text in the same unit.

    Raises:
        DataError: no labelled token, or ids that the model does not have.
        NumericError: a loss is not finite.
    """
    nats, tokens = [0.0] * len(rows), [0] * len(rows)
    for i, logits in window_logits(model, [row["input_ids"] for row in rows], batch_size):
        labels = torch.tensor(list(rows[i]["labels"][1:]), device=logits.device)
        places = (labels != IGNORED).nonzero().squeeze(-1)
        losses = torch.nn.functional.cross_entropy(logits[places].float(), labels[places], reduction="none")
        nats[i] = float(losses.double().sum())
        tokens[i] = (
            len(places) if counted_as is None else sum(label != IGNORED for label in counted_as[i]["labels"][1:])
        )
    counted = [i for i, n in enumerate(tokens) if n]
    if not counted:
        raise DataError(f"{len(rows)} held-out examples have no labelled token; give more data or a larger max_length")
    found = HeldLoss(tuple(nats[i] for i in counted), tuple(tokens[i] for i in counted), _digest(counted_as or rows))
    if not math.isfinite(found.mean):
        raise NumericError(
            f"the loss on {len(rows)} held-out examples is {found.mean}; the model overflows on it, use float32 or"
            " bfloat16"
        )
    return found


def _perplexity(loss: float) -> float:
    """exp, within what a float holds."""
    return math.exp(min(loss, 700.0))


def _digest(rows: Sequence[Row]) -> str:
    """sha256 of ids and labels."""
    return hashlib.sha256(repr([(list(row["input_ids"]), list(row["labels"])) for row in rows]).encode()).hexdigest()
