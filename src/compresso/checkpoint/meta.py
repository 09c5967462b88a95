"""A model as its files describe it, on the meta device: names and shapes without memory."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.checkpoint.bounds import check_tables
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.reasons import reason_of
from compresso.errors import CheckpointError, quoted


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
            f"{config_file} describes a model that cannot be built: {_reason(error, config)}. Check the config."
        ) from error
    check_tables(config_file, model)
    return model


def _reason(error: Exception, config: PreTrainedConfig) -> str:
    """Why a model cannot be built; of a name that modelling code looked up in vain, the field that holds it."""
    if isinstance(error, KeyError) and error.args and isinstance(name := error.args[0], str):
        held = sorted(_holding(config.to_dict(), name))
        if held:
            return f"{' and '.join(held)} {'is' if len(held) == 1 else 'are'} {quoted(repr(name))}, which is unknown"
    return reason_of(error).rstrip(".")


def _holding(fields: Mapping[str, Any], value: str, path: str = "") -> list[str]:
    """The dotted fields that have a value."""
    found: list[str] = []
    for key, held in fields.items():
        if isinstance(held, Mapping):
            found += _holding(held, value, f"{path}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif held == value:
            found.append(f"{path}{key}")
    return found
