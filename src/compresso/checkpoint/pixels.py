"""How a model sees pictures: its preprocessor_config.json, which image processors of transformers write.

Of its fields those are taken that change values: whether colours are scaled to 0..1, shifted by a mean and a deviation,
and in which order they come; and whether numbers of label maps begin at 1. The size is the config's own (SegFormer's
has none: `stages.py`). Departure: pictures are brought to that size as they are, where some processors (MobileViT's)
cut the middle out of a larger one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source
from compresso.checkpoint.stages import PROCESSORS, image_size
from compresso.core.picture import PixelInput
from compresso.errors import CheckpointError

_SCALE = 1 / 255
_REDUCED = ("do_reduce_labels", "reduce_labels")
"""Whether 0 in a label map is no class; the second name is an older one."""
_IN_PATCHES = ("vit", "deit")
"""Families that cut pictures into patches; MobileViT stretches its feature maps until they divide."""
PROCESSOR = "preprocessor_config.json"
UNSAID: Mapping[str, Any] = {
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""How a model sees of which there is a config alone and nothing said: colours from -1 to 1."""


def processor_of(source: Source) -> Path | None:
    """The file that says how a model sees pictures, in its folder or beside its config alone; None without one."""
    folder = source.config_file.parent if source.folder is None else source.folder
    return next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)


def unsaid_colours(source: Source) -> str:
    """That nothing says how a config alone sees colours, and how it does then; "" where something does."""
    if source.kind != "config" or processor_of(source) is not None:
        return ""
    return f"no {PROCESSOR} lies beside it, so it sees colours from -1 to 1"


def pixel_input(source: Source) -> PixelInput:
    """How a model sees pictures; a config alone that nothing is said of, from -1 to 1.

    Raises CheckpointError if a folder does not say, or says what nobody does here.
    """
    height, width = image_size(source.config)
    patch = getattr(source.config, "patch_size", None)
    if source.config.model_type in _IN_PATCHES and isinstance(patch, int) and (height % patch or width % patch):
        raise CheckpointError(
            f"{source.name}: image_size {height} x {width} is no multiple of patch_size {patch}, so that the model"
            " would pass over an edge; correct its config"
        )
    path = processor_of(source)
    if path is None and source.kind != "config":
        raise CheckpointError(
            f"{source.name} has no {PROCESSOR}, which says how it sees pictures; add that of the model it comes from,"
            f" or {json.dumps(UNSAID)}"
        )
    fields, name = (dict(UNSAID), PROCESSOR) if path is None else (read_json(path), path.name)
    inner = fields.get("image_processor")
    fields = inner if isinstance(inner, dict) else fields
    if fields.get("do_rescale", True) is not True or abs(fields.get("rescale_factor", _SCALE) - _SCALE) > 1e-6:
        raise CheckpointError(f"{name}: colours are not scaled by 1/255; only models that see them so are trained")
    mean, std = ((0.0,), (1.0,))
    if fields.get("do_normalize", "image_mean" in fields):
        mean, std = _three(fields, "image_mean", name), _three(fields, "image_std", name)
    flipped = fields.get("do_flip_channel_order", False) is True
    return PixelInput(height, width, mean, std, flipped, any(fields.get(one) is True for one in _REDUCED))


def _three(fields: Mapping[str, Any], name: str, file: str) -> tuple[float, ...]:
    """A number for each channel. Raises CheckpointError."""
    values = fields.get(name)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(one, int | float) for one in values)
        or (name == "image_std" and not all(one > 0 for one in values))
    ):
        raise CheckpointError(f"{file}: {name} is {values!r}; wanted three numbers, one a channel")
    return tuple(float(one) for one in values)
