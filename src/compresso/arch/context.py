"""How many tokens a model reads at most, as its config says."""

from transformers import PreTrainedConfig

_BEHIND_PADDING = ("roberta",)
"""Families that count positions from behind the padding token's id, so that those before it are of no use."""


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model with this config was made to read; None if it does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    padding = config.pad_token_id
    return length - padding - 1 if config.model_type in _BEHIND_PADDING and isinstance(padding, int) else length
