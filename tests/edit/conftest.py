"""One tiny Llama (grouped-query attention, tied head) with weights large enough that logits are O(1)."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def make() -> Callable[..., LlamaForCausalLM]:
    """Build the model, in eval mode; keywords change its config."""

    def build(**changes: object) -> LlamaForCausalLM:
        sizes = {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
        }
        fixed = {
            "vocab_size": 64,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **fixed, **changes})).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator))
                else:
                    parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
        return model

    return build
