"""Shrunk models made by hand, independently of the package: stock models whose Linear modules are replaced by narrower
ones.

Where a sub-layer is absent, the layer's forward is replaced by one that does without it. These live models are the
oracle: what is written must compute what they compute.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from compresso.arch.base import LayerShape

HIDDEN, HEAD_DIM, VOCAB = 48, 8, 89
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EVEN = (LayerShape(4, 2, 40),) * 4
UNEVEN = (LayerShape(4, 2, 40), LayerShape(6, 3, 24), LayerShape(2, 1, 64), LayerShape(4, 2, 8))
NO_MIDDLE_ATTENTION = (LayerShape(4, 2, 40), LayerShape(0, 0, 24), LayerShape(2, 1, 64), LayerShape(4, 2, 8))
NO_FIRST_ATTENTION = (LayerShape(0, 0, 40), LayerShape(6, 3, 24), LayerShape(2, 1, 64), LayerShape(0, 0, 8))
NO_FFN = (LayerShape(4, 2, 40), LayerShape(6, 3, 0), LayerShape(0, 0, 0), LayerShape(2, 1, 8))
SHAPES = {
    "even": EVEN,
    "uneven": UNEVEN,
    "no middle attention": NO_MIDDLE_ATTENTION,
    "no first attention": NO_FIRST_ATTENTION,
    "no FFN": NO_FFN,
}


def narrow_model(family: str, shapes: Sequence[LayerShape], seed: int = 0, **config: Any) -> PreTrainedModel:
    """A stock model of the family in float32 with random weights, its layers cut to the shapes, its config left as it
    was.
    """
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": len(shapes),
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": HEAD_DIM,
        "intermediate_size": 72,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields | config)).eval()
    for parameter in model.parameters():  # norms and biases too, so that a lost one is seen
        parameter.data += 0.1 * torch.randn_like(parameter)
    slot = 0
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        attention = layer.self_attn
        if shape.query_heads:
            query, kv = shape.query_heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
            attention.q_proj, attention.o_proj = _rows(attention.q_proj, query), _columns(attention.o_proj, query)
            attention.k_proj, attention.v_proj = _rows(attention.k_proj, kv), _rows(attention.v_proj, kv)
            attention.num_key_value_groups = shape.query_heads // shape.kv_heads
            attention.layer_idx = slot
            slot += 1
        else:
            layer.self_attn, layer.input_layernorm = _Nothing(), nn.Identity()
        if shape.channels:
            layer.mlp.gate_proj, layer.mlp.up_proj = (
                _rows(layer.mlp.gate_proj, shape.channels),
                _rows(layer.mlp.up_proj, shape.channels),
            )
            layer.mlp.down_proj = _columns(layer.mlp.down_proj, shape.channels)
        else:
            layer.mlp, layer.post_attention_layernorm = None, nn.Identity()
            layer.forward = MethodType(_without_ffn, layer)
    return model


def some_ids(batch: int = 2, length: int = 9) -> Tensor:
    """Token ids [batch, length] without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def n_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Nothing(nn.Module):
    """An attention that is not there: it adds zero and touches no cache."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _without_ffn(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    return hidden_states + attended


def _rows(linear: nn.Linear, n: int) -> nn.Linear:
    cut = nn.Linear(linear.in_features, n, bias=linear.bias is not None)
    cut.weight.data = linear.weight.data[:n].clone()
    if linear.bias is not None:
        cut.bias.data = linear.bias.data[:n].clone()
    return cut


def _columns(linear: nn.Linear, n: int) -> nn.Linear:
    cut = nn.Linear(n, linear.out_features, bias=linear.bias is not None)
    cut.weight.data = linear.weight.data[:, :n].clone()
    if linear.bias is not None:
        cut.bias.data = linear.bias.data.clone()
    return cut
