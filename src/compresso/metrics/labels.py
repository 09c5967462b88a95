"""How a classifier does on examples that no stage trained on: its accuracy, with its standard error, beside that of
always giving the most frequent label; of two labels also the F1 of the second, as GLUE has it (arXiv 1804.07461).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.core.row import Row
from compresso.metrics.by_length import Collate, examples_sha256, losses_by_length
from compresso.metrics.guard import Guard
from compresso.metrics.label_guard import judge_labels
from compresso.metrics.ratio import ratio_error
from compresso.metrics.record import Environment, Measurement

ACCURACY, GUESS, F1 = "held/acc", "held-majority/acc", "held/f1"


@dataclass(frozen=True)
class LabelScore:
    """What a classifier said of examples.

    Args:
        nats: the loss of each.
        right: whether each was given its label.
        most_frequent: examples of the most frequent label.
        examples_sha256: of their ids and labels; the same ones have the same.
        second: of two labels, whether each example has the second one; empty for more labels.
    """

    nats: tuple[float, ...]
    right: tuple[bool, ...]
    most_frequent: int
    examples_sha256: str
    second: tuple[bool, ...] = ()

    @property
    def mean(self) -> float:
        """Nats a label."""
        return math.fsum(self.nats) / len(self.nats)

    @property
    def accuracy(self) -> float:
        """The share of examples that were given their label."""
        return sum(self.right) / len(self.right)

    @property
    def guess(self) -> float:
        """The accuracy of always giving the most frequent label."""
        return self.most_frequent / len(self.right)

    @property
    def f1(self) -> tuple[float, float | None]:
        """Of the second of two labels, with its standard error: 2 hits / (2 hits + false ones + missed ones); 0 where
        there are none of the three.
        """
        hits = [2 * (right and has) for right, has in zip(self.right, self.second, strict=True)]
        below = [hit + (not right) for hit, right in zip(hits, self.right, strict=True)]
        return sum(hits) / max(sum(below), 1), ratio_error(hits, below)

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """The accuracy, "held/acc", with the standard error of a share; counted beside it what always giving the most
        frequent label would reach; of two labels the F1, "held/f1".
        """
        n = len(self.right)
        shared: dict[str, Any] = {"unit": "share", "n": n, "environment": environment}
        shared["protocol"] = {"corpus": corpus, "examples": n, "examples_sha256": self.examples_sha256[:16]}
        spread = math.sqrt(self.accuracy * (1 - self.accuracy) / n)
        found = (
            Measurement(name=ACCURACY, value=self.accuracy, how="measured", stderr=spread, **shared),
            Measurement(name=GUESS, value=self.guess, how="counted", **shared),
        )
        if not self.second:
            return found
        value, error = self.f1
        return (*found, Measurement(name=F1, value=value, how="measured", stderr=error, **shared))


def label_score(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Collate,
    batch_size: int = 32,
) -> LabelScore:
    """What a classifier says of examples, those of like length together; its mode is put back.

    Raises:
        DataError: no examples.
        NumericError: a loss is not finite.
    """
    right, classes = [False] * len(rows), 0

    def scores(places: Sequence[int], batch: dict[str, Tensor]) -> list[float]:
        nonlocal classes
        logits, labels = logits_of(model, batch).float(), batch["labels"]
        classes = logits.shape[-1]
        for i, hit in zip(places, (logits.argmax(-1) == labels).tolist(), strict=True):
            right[i] = hit
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()

    nats = losses_by_length(model, rows, collate, batch_size, scores)
    frequent = Counter(row["labels"][0] for row in rows).most_common(1)[0][1]
    second = tuple(row["labels"][0] == 1 for row in rows) if classes == 2 else ()
    return LabelScore(nats, tuple(right), frequent, examples_sha256(rows), second)


def judge_classes(dense: Mapping[str, float], pruned: Mapping[str, float], classes: int | None) -> Guard:
    """By what is left of the lead over the most frequent of so many labels, and by the loss.

    Args:
        dense, pruned: "loss" on held-out examples, "examples", and what was measured, by name; absent if it was not.
        classes: of the model.
    """
    n = pruned.get("examples")
    return judge_labels(
        dense.get(ACCURACY),
        pruned.get(ACCURACY),
        pruned.get(GUESS),
        None if n is None else int(n),
        losses=(dense.get("loss"), pruned.get("loss")),
        labels=classes,
    )
