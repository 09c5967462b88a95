"""What the tasks of models of pictures have in common: whom they refuse, what a batch holds, and where distillation
compares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, PreTrainedConfig

from compresso.core.picture import Picture, PixelInput
from compresso.core.row import Row
from compresso.data.augmentations import Augmentation, augmented
from compresso.data.records import Records
from compresso.errors import DataError
from compresso.tasks.base import Reading
from compresso.training.halves import Compared, Tokens

_HEADS: dict[str, Any] = {
    "image-classification": AutoModelForImageClassification,
    "segmentation": AutoModelForSemanticSegmentation,
}
"""transformers' class of each task."""


def obstacle(config: PreTrainedConfig, head: Any, task: str, such: str) -> str:
    """Why no model with this config does a task; "" for one of pictures.

    Args:
        config: of the model.
        head: transformers' class that opens one with a head for the task.
        task: its name.
        such: a family that does it.
    """
    if type(config) in head._model_mapping:
        return ""
    if able := seen_by(config):
        return (
            f"({config.model_type}) sees pictures, but has no class for --task {task}; give --task {able[0]}, or"
            f" another model, such as {such}"
        )
    return f"({config.model_type}) sees no pictures; --task {task} takes a model of pictures, such as {such}"


def seen_by(config: PreTrainedConfig) -> list[str]:
    """The tasks of pictures that models with this config have a class for, by name."""
    return [name for name, auto in _HEADS.items() if type(config) in auto._model_mapping]


def inputs_of(reading: Reading, records: Records) -> PixelInput:
    """How the model sees pictures. Raises DataError if nobody said."""
    if reading.pixels is None:
        raise DataError(
            f"{records.source}: nothing says how the model sees pictures; read them by compresso.checkpoint.pixels"
        )
    return reading.pixels


def picture_of(row: Row) -> Picture:
    """The picture of an example of pictures. Raises DataError for another one."""
    picture = row.get("picture")
    if picture is None:
        raise DataError("an example holds no picture; read data of the task's own kind")
    return picture


def classes_of(row: Row) -> Tensor:
    """The class of each pixel of an example, uint8 [height, width]. Raises DataError for one without."""
    classes = picture_of(row).classes
    if classes is None:
        raise DataError("an example's picture has no label map; read data of the task's own kind")
    return classes


def pixel_values(rows: Sequence[Row]) -> Tensor:
    """Pictures side by side as the model sees them, float32 [n, 3, height, width]. Raises DataError for none."""
    if not rows:
        raise DataError("a batch of 0 pictures; wanted at least one")
    return torch.stack([one.inputs(one.pixels) for one in map(picture_of, rows)])


def drawn_anew(row: Row, how: Augmentation, seed: int) -> Row:
    """The example with its picture as one pass sees it."""
    return {**row, "picture": augmented(picture_of(row), how, seed)}


def whole_pictures(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """Every label, and the hidden states of all patches."""
    every = torch.ones(len(batch["labels"]), dtype=torch.bool)
    return Compared(batch["labels"], torch.ones_like(batch["labels"], dtype=torch.bool), every)
