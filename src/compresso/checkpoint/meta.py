"""A model as its files describe it, on the meta device: names and shapes without memory."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.checkpoint.bounds import check_tables
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.reasons import reason_of
from compresso.errors import CheckpointError


def as_written(config: PreTrainedConfig, config_file: Path) -> PreTrainedModel:
    """The modules of the class that the config names.

    Args:
        config: it.
        config_file: where it was read, for errors.

    Raises:
        ArchError: it is of no kind that is opened.
        CheckpointError: its config asks for the impossible.
    """
    auto = auto_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # a config may ask for anything, and modelling code fails on it in any way
        raise CheckpointError(
            f"{config_file} describes a model that cannot be built: {reason_of(error).rstrip('.')}. Check the config."
        ) from error
    check_tables(config_file, model)
    return model
