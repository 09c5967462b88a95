"""Pictures of a data set as a model with a head sees them, where nothing is trained."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import Source
from compresso.data.registry import load_records
from compresso.data.survival import left_out
from compresso.errors import ArchError, DataError
from compresso.tasks.base import Reading, Task, tasks

log = logging.getLogger(__name__)


@torch.no_grad()
def pictures_of(source: Source, data: str | Path, most: int) -> Tensor:
    """Pixel values of evenly spaced pictures [n, channels, height, width], float32, 2 <= n <= most.

    Raises:
        DataError: data of another kind, or a single picture.
        ArchError: a model without a head for a task of pictures.
        CheckpointError: a model that does not say how it sees.
    """
    task = _task(source.config)
    records = load_records(data, skip_bad=None, form=task.form)
    encoded = task.encode(
        records, None, Reading(0, limit=most, skip_bad=None, pixels=pixel_input(source)), source.config
    )
    rows = encoded.rows
    for sentence in left_out(encoded, 0):
        log.warning("%s", sentence)
    if len(rows) < 2:
        raise DataError(
            f"--data {records.source} has {len(rows)} picture; wanted at least two, one to scale activations by and one"
            " to compare classes on"
        )
    return task.collate(rows, 0)["pixel_values"]


def _task(config: PreTrainedConfig) -> Task:
    """The task of pictures whose head the model has."""
    for task in tasks().values():
        if not task.reads_text and not task.obstacle(config) and not task.lacks_head(config):
            return task
    raise ArchError(f"{config.model_type} has no head for a task of pictures; give a model that a run wrote")
