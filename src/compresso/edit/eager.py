"""Attention that shows its probabilities: fused kernels compute none."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

EAGER = "eager"


def attention_of(model: PreTrainedModel) -> str:
    """How a model computes attention, such as "sdpa"."""
    return str(model.config._attn_implementation)


@contextmanager
def eager(*models: nn.Module) -> Iterator[None]:
    """Within the context, attention is computed step by step; afterwards as before.

    Layers of some families have a config of their own, which the models' own method does not reach.
    """
    found = [getattr(module, "config", None) for model in models for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = EAGER
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
