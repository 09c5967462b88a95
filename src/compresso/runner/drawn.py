"""A run that begins with a config.json alone: a model of pictures from random numbers, which the recipe's first stage
trains.

The seed draws the weights, so that a resumed run begins with the same ones; gains of batch norms are 1. How the model
sees pictures is what preprocessor_config.json beside the config says; without one colours are brought to -1..1, which
is said. Where no stage of the recipe trains all weights first, or the model reads text, nothing is drawn, and the run
is refused as before.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.kinds import from_config, of_pictures
from compresso.checkpoint.pixels import PROCESSOR, UNSAID, processor_of, unsaid_colours
from compresso.checkpoint.scratch import scratch_folder
from compresso.checkpoint.source import Source, open_source
from compresso.errors import CompressoError
from compresso.runner.recipe import read
from compresso.runner.recipe_file import stages_of
from compresso.runner.task_options import for_model, with_task
from compresso.stage import card
from compresso.training.noise import mixed_seed

log = logging.getLogger(__name__)


@contextmanager
def drawn(
    model: str, recipe: str | Path | Mapping[str, Any], task: str | None, seed: int, quiet: bool
) -> Iterator[str]:
    """What to open a model by: a temporary folder with drawn weights where it is a config that is trained first, else
    as it was given.

    Args:
        model: as a run is given it.
        recipe, task: likewise.
        seed: of the run.
        quiet: whether nothing is said.
    """
    path = Path(model).expanduser()
    source = open_source(path) if path.suffix == ".json" and path.is_file() else None
    if source is None or not of_pictures(source.config) or not _trained_first(source, recipe, task):
        yield model
        return
    with scratch_folder() as scratch:
        folder = scratch / source.name
        beside, unsaid = processor_of(source), unsaid_colours(source)
        made = _drawn(source, seed)
        made.save_pretrained(folder)
        if beside is not None:
            shutil.copyfile(beside, folder / beside.name)
        else:
            write_text(folder / PROCESSOR, json.dumps(UNSAID, indent=2) + "\n")
        if not quiet:
            numbers = sum(parameter.numel() for parameter in made.parameters())
            drew = f"its {numbers:,} weights are drawn by seed {seed}"
            log.warning("%s: a config alone; %s", source.name, "; ".join(filter(None, (drew, unsaid))))
        del made
        yield str(folder)


def _drawn(source: Source, seed: int) -> PreTrainedModel:
    """The model of a config, from random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed("weights", seed))
        made = from_config(source.config, dtype=torch.float32)
    begin_norms_(made)
    return made


def begin_norms_(model: nn.Module) -> None:
    """Put the gains of batch norms of a model of random numbers to 1, where torch begins them. transformers' MobileViT
    draws them around 0, so that each of its norms makes what it reads a fiftieth as large.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def _trained_first(source: Source, recipe: str | Path | Mapping[str, Any], task: str | None) -> bool:
    """Whether a recipe's first stage for this model trains all weights; False for a recipe that is refused later."""
    try:
        raw = with_task(recipe if isinstance(recipe, Mapping) else read(recipe), task)
        stages = stages_of(for_model(raw, source.config))
        return bool(stages) and card(stages[0][0]).makes_dense
    except CompressoError:
        return False
