"""Phi-3 (arXiv 2404.14219): a LLaMA whose q, k and v come from one linear, and gate and up from another.

RMSNorms, so hidden dimensions can leave. The stock attention splits q, k and v by the config's head count, so that a
layer with another count gets a config of its own (`compresso.arch.layer_config`); a checkpoint needs as many heads in
every layer.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

PHI3 = register(
    Stack(
        name="phi3",
        layers=("model.layers", "layers"),
        parts=Parts(
            attention="self_attn",
            core="self_attn",
            read=("self_attn.qkv_proj",),
            write="self_attn.o_proj",
            attention_norms=("input_layernorm",),
            ffn="mlp",
            up=("mlp.gate_up_proj",),
            down="mlp.down_proj",
            ffn_norms=("post_attention_layernorm",),
            kv_heads=("num_key_value_heads",),
            packing="blocks",
            fused_up=2,
            heads_in_config=True,
        ),
        generates=True,
        final_norm=("model.norm", "norm"),
    )
)
