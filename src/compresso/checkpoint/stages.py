"""What is looked at in the config of a model of stages, SegFormer, before anything is built from it: the numbers of
each stage, and the size of pictures, for which its config class has no field, as it runs at any.

What the image processor beside the config brings pictures to is put into the config as `image_size`, where every other
family says it; published configs that have this field too do not mean it (224, beside a processor of 512).
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compresso.checkpoint.folder import read_json
from compresso.core.picture import that_sees
from compresso.errors import CheckpointError
from compresso.native import staged_family_of

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where image processors of transformers say how a model sees pictures."""
_MOST = 4096
"""Of a side, in pixels."""
_OF_STAGES = ("hidden_sizes", "num_attention_heads", "mlp_ratios", "sr_ratios", "patch_sizes", "strides")


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width that a config says pictures have. Raises CheckpointError if it says none."""
    size = getattr(that_sees(config), "image_size", None)
    both = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(both) != 2 or not all(isinstance(one, int) and 0 < one <= _MOST for one in both):
        raise CheckpointError(
            f"config.json says image_size={size!r}; wanted a number of pixels, or height and width, up to {_MOST}"
        )
    return both[0], both[1]


def check_stages_(config: PreTrainedConfig, folder: Path) -> None:
    """Put the size that an image processor says into a SegFormer's config, and look at its numbers; other configs stay
    as they are.

    Args:
        config: of a model; what it says as `image_size` stays where the processor says none.
        folder: where the config lies, and a processor may.

    Raises:
        CheckpointError: neither says a size, a processor's file is malformed, or a number is none of a stage.
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
    image_size(config)
    _check_numbers(config, folder)


def _check_numbers(config: Any, folder: Path) -> None:
    """Raise CheckpointError for a stage without what it needs."""
    n = config.num_encoder_blocks
    for name, least in (*((name, 1) for name in _OF_STAGES), ("depths", 0)):
        values = getattr(config, name)
        if n < 1 or len(values) != n or min(values) < least:
            raise CheckpointError(
                f"{folder.name}: config.json says {name}={list(values)} of {n} stages (num_encoder_blocks); wanted a"
                f" number for each, at least {least}"
            )
    pairs = zip(config.num_attention_heads[:n], config.hidden_sizes[:n], strict=True)
    heads = next((f"{heads} heads in a stage of {width} channels" for heads, width in pairs if heads > width), None)
    if heads is not None or config.decoder_hidden_size < 1:
        odd = heads or f"decoder_hidden_size={config.decoder_hidden_size}"
        raise CheckpointError(
            f"{folder.name}: config.json says {odd}; wanted at least 1 of each, and a channel for each head"
        )


def _sides(size: Any) -> Any:
    """A processor's size as `image_size`: a number, or height and width; None for one by another rule."""
    if isinstance(size, dict):
        return [size["height"], size["width"]] if {"height", "width"} <= size.keys() else None
    return size
