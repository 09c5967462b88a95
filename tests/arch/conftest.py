"""Tiny decoders with weights large enough that logits are O(1): a wrong fold must not hide below a tolerance."""

import copy
import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 176,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # large, so that an eps that was not rescaled shows
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama_mha": lambda: LlamaConfig(**SIZES, num_attention_heads=4),
    "llama_gqa_tied": lambda: LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
    "llama_gqa": lambda: LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2),
    "llama_biased": lambda: LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, sliding_window=5),
    "qwen2": lambda: Qwen2Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=4, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
}


@functools.cache
def _original(name: str) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").eval()
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator))
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            else:
                scale = (0.1 if tied else 0.7) if "embed" in parameter_name else 1 / math.sqrt(parameter.shape[1])
                parameter.normal_(0, scale, generator=generator)
    return model


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """A fresh copy of the named tiny model in float32."""
    return lambda name: copy.deepcopy(_original(name))


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets RMSNorms compute in their input's dtype; the stock ones always go through float32, which would hide errors below 1e-7."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in {type(m) for name in CONFIGS for m in _original(name).modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(norm, "forward", forward)
    yield
