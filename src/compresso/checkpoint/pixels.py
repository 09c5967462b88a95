"""How a model sees pictures: its preprocessor_config.json, which image processors of transformers write.

Of its fields those are taken that change values: whether colours are scaled to 0..1, shifted by a mean and a deviation,
and in which order they come; and whether numbers of label maps begin at 1. The size is the config's own (SegFormer's
has none: `stages.py`). Departure: pictures are brought to that size as they are, where some processors (MobileViT's)
cut the middle out of a larger one.
"""

from collections.abc import Mapping
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


def pixel_input(source: Source) -> PixelInput:
    """How a model sees pictures. Raises CheckpointError if its folder does not say, or says what nobody does here."""
    height, width = image_size(source.config)
    patch = getattr(source.config, "patch_size", None)
    if source.config.model_type in _IN_PATCHES and isinstance(patch, int) and (height % patch or width % patch):
        raise CheckpointError(
            f"{source.name}: image_size {height} x {width} is no multiple of patch_size {patch}, so that the model"
            " would pass over an edge; correct its config"
        )
    named = [] if source.folder is None else [source.folder / name for name in PROCESSORS]
    path = next((path for path in named if path.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{source.name} has no preprocessor_config.json, which says how it sees pictures; add that of the model it"
            ' comes from, or {"do_rescale": true, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std":'
            " [0.5, 0.5, 0.5]}"
        )
    fields = read_json(path)
    inner = fields.get("image_processor")
    fields = inner if isinstance(inner, dict) else fields
    if fields.get("do_rescale", True) is not True or abs(fields.get("rescale_factor", _SCALE) - _SCALE) > 1e-6:
        raise CheckpointError(f"{path.name}: colours are not scaled by 1/255; only models that see them so are trained")
    mean, std = ((0.0,), (1.0,))
    if fields.get("do_normalize", "image_mean" in fields):
        mean, std = _three(fields, "image_mean", path.name), _three(fields, "image_std", path.name)
    flipped = fields.get("do_flip_channel_order", False) is True
    return PixelInput(height, width, mean, std, flipped, any(fields.get(name) is True for name in _REDUCED))


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
