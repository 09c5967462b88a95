"""How many tokens a model reads at most, and how many a picture is to it, as its config says."""

from transformers import PreTrainedConfig, PreTrainedModel

_PATCHES = {"vit": 1, "deit": 2}
"""Families that cut pictures into patches, and how many tokens they add."""
_BEHIND_PADDING = ("roberta",)
"""Families that count positions from behind the padding token's id, so that those before it are of no use."""


def width_of(config: PreTrainedConfig) -> int:
    """How wide a model is: its hidden size, or the largest one of stages that differ."""
    width = getattr(config, "hidden_size", None)
    return int(width) if width else max(int(one) for one in config.hidden_sizes)  # pyright: ignore[reportAttributeAccessIssue]


def tokens_of_picture(config: PreTrainedConfig) -> int:
    """Tokens that a picture is to a model that cuts it into patches: theirs, and the class token (DeiT's two); 1 for
    other models of pictures, whose multiply-accumulates are counted by picture.
    """
    patch, size = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    if config.model_type not in _PATCHES or not isinstance(patch, int) or not isinstance(size, int):
        return 1
    return (size // patch) ** 2 + _PATCHES[config.model_type]


def macs_of(model: PreTrainedModel) -> dict[str, str]:
    """`{"macs_of": "picture"}` where multiply-accumulates are counted by picture, "patch" where by patch (and a class
    token as one), else nothing: by token.
    """
    if model.main_input_name != "pixel_values":
        return {}
    return {"macs_of": unit_of_picture(model.config)}


def unit_of_picture(config: PreTrainedConfig) -> str:
    """What multiply-accumulates of a model of pictures are counted by: "picture", or "patch" where it is cut."""
    return "picture" if tokens_of_picture(config) == 1 else "patch"


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model with this config was made to read; None if it does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    padding = config.pad_token_id
    return length - padding - 1 if config.model_type in _BEHIND_PADDING and isinstance(padding, int) else length
