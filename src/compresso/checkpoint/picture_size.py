"""The size of pictures of a family whose config class has no field for it: SegFormer's, which runs at any.

What the image processor beside the config brings pictures to is put into the config as `image_size`, where every other
family says it; published configs that have this field too do not mean it (224, beside a processor of 512).
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compresso.checkpoint.folder import read_json
from compresso.errors import CheckpointError
from compresso.native import staged_family_of

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where image processors of transformers say how a model sees pictures."""


def tell_size_(config: PreTrainedConfig, folder: Path) -> None:
    """Put the size that an image processor says into a SegFormer's config; other configs stay as they are.

    Args:
        config: of a model; what it says as `image_size` stays where the processor says none.
        folder: where the config lies, and a processor may.

    Raises:
        CheckpointError: neither says a size, or a processor's file is malformed.
    """
    if staged_family_of(config.model_type) is None:
        return
    path = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    fields = {} if path is None else read_json(path)
    inner = fields.get("image_processor")
    size = _sides((inner if isinstance(inner, dict) else fields).get("size"))
    if size is not None:
        config.image_size = size  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(config, "image_size", None) is None:
        raise CheckpointError(
            f"{folder.name}: a SegFormer runs at any size of pictures, and nothing says which. Write it into"
            ' config.json, such as "image_size": [512, 512], or as "size" into a preprocessor_config.json beside it.'
        )


def _sides(size: Any) -> Any:
    """A processor's size as `image_size`: a number, or height and width; None for one by another rule."""
    if isinstance(size, dict):
        return [size["height"], size["width"]] if {"height", "width"} <= size.keys() else None
    return size
