"""The loss of a model on each of some examples, those of like length side by side: little of a batch is padding."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.row import Row
from compresso.errors import DataError, NumericError

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]
"""Examples -> their batch."""
Scores = Callable[[Sequence[int], dict[str, Tensor]], Sequence[float]]
"""Places of some examples, and their batch on the model's device -> nats of each of them; it may note more."""


def losses_by_length(
    model: PreTrainedModel, rows: Sequence[Row], collate: Collate, batch_size: int, scores: Scores
) -> tuple[float, ...]:
    """Nats of each example, in the order of the rows; the model's mode is put back.

    Raises:
        DataError: no examples.
        NumericError: a loss is not finite.
    """
    if not rows:
        raise DataError("0 held-out examples; give more data, or raise data.held")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    nats, was_training = [0.0] * len(rows), model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: value.to(model.device) for name, value in collate([rows[i] for i in chosen]).items()}
            for i, value in zip(chosen, scores(chosen, batch), strict=True):
                nats[i] = value
    model.train(was_training)
    if not math.isfinite(math.fsum(nats)):
        raise NumericError(
            f"the loss on {len(rows)} held-out examples is not finite; the model overflows on it, use float32 or"
            " bfloat16"
        )
    return tuple(nats)


def examples_sha256(rows: Sequence[Row]) -> str:
    """Of the ids or pixels and labels of examples: the same ones have the same."""
    total = hashlib.sha256(repr([(list(row["input_ids"]), list(row["labels"])) for row in rows]).encode())
    for picture in (row["picture"] for row in rows if "picture" in row):
        for tensor in (picture.pixels, *(() if picture.classes is None else (picture.classes,))):
            total.update(f"{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
