"""Phi-1, Phi-1.5 (arXiv 2309.05463) and Phi-2: LayerNorm decoder with rotary positions on a part of each head, biases
everywhere, the head's included; attention and FFN read the same norm, side by side.

The one norm of a layer leaves with the whole layer only. No hidden axis: LayerNorm subtracts the mean of the residual
stream. Biases keep the last head and the last channel of a layer; whole sub-layers and layers can leave. The stock
class obeys a config's `head_dim`, which is given it where heads leave - but for norms on queries and keys
(`qk_layernorm`), whose width it takes from hidden size and head count, so that such a model is written with all its
heads.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

PHI = register(
    Stack(
        name="phi",
        layers=("model.layers", "layers"),
        parts=Parts(
            attention="self_attn",
            core="self_attn",
            read=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            write="self_attn.dense",
            head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
            ffn="mlp",
            up=("mlp.fc1",),
            down="mlp.fc2",
            shared_norms=("input_layernorm",),
        ),
        generates=True,
        obeys_head_dim=lambda config: not config.qk_layernorm,
    )
)
