"""How a segmenter does on pictures that no stage trained on: the mean over classes of intersection over union (mIoU),
from one confusion matrix of the whole set; classes that neither occur nor are given are left out of the mean.

Beside it stand each class' own, the share of pixels that are given their class, and what always giving the most
frequent class would reach. A standard error of mIoU is not given: pixels of a picture are not drawn one by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.core.losses import IGNORED
from compresso.core.row import Row
from compresso.core.segments import at_labels, confusion, intersection_over_union
from compresso.errors import DataError, NumericError
from compresso.metrics.by_length import examples_sha256
from compresso.metrics.record import Environment, Measurement

MIOU, PIXELS, GUESS = "held/miou", "held/pixel-acc", "held-majority/miou"


@dataclass(frozen=True)
class SegmentScore:
    """What a segmenter said of pictures.

    Args:
        nats: the sum of the losses of all pixels with a class.
        counted: the confusion matrix [its own class][given class].
        names: of the classes.
        pictures: how many.
        examples_sha256: of their pixels and classes.
    """

    nats: float
    counted: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    pictures: int
    examples_sha256: str

    @property
    def mean(self) -> float:
        """Nats a pixel."""
        return self.nats / sum(map(sum, self.counted))

    @property
    def by_class(self) -> list[float]:
        """Intersection over union of each class; NaN for one that neither occurs nor is given."""
        return intersection_over_union(torch.tensor(self.counted)).tolist()

    @property
    def miou(self) -> float:
        """The mean over classes."""
        return _mean(self.by_class)

    @property
    def guess(self) -> float:
        """mIoU of always giving the most frequent class."""
        of_class = [sum(row) for row in self.counted]
        return max(of_class) / sum(of_class) / sum(map(bool, of_class))

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """mIoU, "held/miou"; the share of pixels given their class; what the most frequent class alone would reach; and
        each class' own intersection over union, "held/iou/NAME".
        """
        shared: dict[str, Any] = {"unit": "share", "n": self.pictures, "environment": environment}
        shared["protocol"] = {
            "corpus": corpus,
            "examples": self.pictures,
            "examples_sha256": self.examples_sha256[:16],
            "confusion": "one matrix",
        }
        right = sum(row[i] for i, row in enumerate(self.counted)) / sum(map(sum, self.counted))
        each = zip(self.names, self.by_class, strict=True)
        return (
            Measurement(name=MIOU, value=self.miou, how="measured", **shared),
            Measurement(name=PIXELS, value=right, how="measured", **shared),
            Measurement(name=GUESS, value=self.guess, how="counted", **shared),
            *(
                Measurement(name=f"held/iou/{name}", value=value, how="measured", **shared)
                for name, value in each
                if not math.isnan(value)
            ),
        )


def segment_score(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    names: Sequence[str],
    batch_size: int = 8,
) -> SegmentScore:
    """What a segmenter says of pictures; its mode is put back.

    Raises:
        DataError: no pictures.
        NumericError: a loss is not finite.
    """
    if not rows:
        raise DataError("0 held-out pictures; give more data, or raise data.held")
    nats, counted, was_training = 0.0, torch.zeros(len(names), len(names), dtype=torch.long), model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()}
            logits, labels = at_labels(logits_of(model, batch), batch["labels"]), batch["labels"]
            nats += float(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            counted += confusion(logits.argmax(1), labels, len(names)).cpu()
    model.train(was_training)
    if not math.isfinite(nats):
        raise NumericError(
            f"the loss on {len(rows)} held-out pictures is not finite; the model overflows on them, use float32"
        )
    matrix = tuple(tuple(row) for row in counted.tolist())
    return SegmentScore(nats, matrix, tuple(names), len(rows), examples_sha256(rows))


def _mean(values: Sequence[float]) -> float:
    """Over those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known)
