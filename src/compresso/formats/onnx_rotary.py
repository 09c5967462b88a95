"""Positions that a model turns by complex numbers, in the real ones that torch's exporter translates: DeepSeek-V2's."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def turned(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, neighbours of which are real and imaginary parts, multiplied by numbers on the unit circle.

    Args:
        queries, keys: [batch, heads, seq, width].
        angles: [batch, seq, width / 2], complex.

    Returns:
        Those two, of the same shapes and dtypes.
    """
    real, imaginary = torch.view_as_real(angles).unsqueeze(1).unbind(-1)

    def times(states: Tensor) -> Tensor:
        one, other = states.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = (one * real - other * imaginary, one * imaginary + other * real)
        return torch.stack(pairs, dim=-1).flatten(3).type_as(states)

    return times(queries), times(keys)


@contextmanager
def real_numbers(model: PreTrainedModel) -> Iterator[None]:
    """A model that turns its states without complex numbers; transformers is as it was afterwards, whatever happens."""
    if model.config.model_type != "deepseek_v2":
        yield
        return
    module: Any = importlib.import_module(type(model).__module__)  # where its attention looks for the function
    stock = module.apply_rotary_emb
    try:
        module.apply_rotary_emb = turned
        yield
    finally:
        module.apply_rotary_emb = stock
