"""An encoder under a new head, as its family draws it; the encoder's own modules are moved, not copied."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def under_new_head(model: PreTrainedModel, auto: Any, fields: Mapping[str, object], seed: int) -> PreTrainedModel:
    """A model of another class around the same encoder.

    Where the class wants a part of the encoder that is not there (a pooler), it is new, too; one that it has no use for
    is let go. What the class ties to the embedding is tied.

    Args:
        model: an encoder, with a head or without; its modules belong to the result.
        auto: transformers' auto class of the result.
        fields: of the result's config, beside those of the model's.
        seed: of what is drawn.
    """
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        torch.manual_seed(seed)
        made: PreTrainedModel = auto.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    encoder, fresh = model.base_model, dict(made.base_model.named_children())
    there = dict(encoder.named_children())
    for name in there.keys() - fresh.keys():
        setattr(encoder, name, None)
    for name in [name for name in fresh if name not in there]:
        setattr(encoder, name, fresh[name])
    for module in encoder.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = made.config  # pyright: ignore[reportArgumentType]  # no tensor and no module
    setattr(made, made.base_model_prefix, encoder)
    made.tie_weights()
    return made.train(model.training)
