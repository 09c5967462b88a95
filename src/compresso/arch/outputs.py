"""One forward of any described model, for comparing what two of them compute."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.core.picture import that_sees

IDS = 32
"""Tokens that `any_input` has at most."""


def any_input(config: PreTrainedConfig) -> Tensor:
    """What a model with this config can be asked where nobody gave an example: its first tokens [1, seq], int64, or one
    image of noise [1, channels, height, width].
    """
    size = getattr(config, "vocab_size", None)
    if size is not None:
        return torch.arange(min(IDS, size)).unsqueeze(0)
    seen = that_sees(config)
    sides = seen.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    shape = (1, int(seen.num_channels), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: PreTrainedModel, given: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Logits (of starts and ends side by side), or the last hidden states of a model without a head, in float32 on the
    model's device.

    given: token ids [batch, seq], or pixel values [batch, channels, height, width] for a model that reads images; or
        all that a model of tokens reads, by name.
    """
    if isinstance(given, Mapping):
        result = model(**given, use_cache=False)
    elif model.main_input_name == "pixel_values":
        result = model(pixel_values=given.to(model.dtype))
    else:
        result = model(input_ids=given, use_cache=False)
    if hasattr(result, "start_logits"):
        return torch.stack([result.start_logits, result.end_logits], -1).float()
    return (result.logits if hasattr(result, "logits") else result.last_hidden_state).float()
