"""GPT-NeoX (arXiv 2204.06745; Pythia): LayerNorm decoder with rotary positions; one linear holds, head by head, q, k
and v.

No hidden axis: LayerNorm subtracts the mean of the residual stream. Attention and FFN read the same stream (or, by the
config, follow one another); their sums are the same whichever leaves. With biases no layer may lose its last head or
channel.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

GPT_NEOX = register(
    Stack(
        name="gpt_neox",
        layers=("gpt_neox.layers", "layers"),
        parts=Parts(
            attention="attention",
            core="attention",
            read=("attention.query_key_value",),
            write="attention.dense",
            attention_norms=("input_layernorm",),
            ffn="mlp",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            ffn_norms=("post_attention_layernorm",),
            head_dim="head_size",
            packing="heads",
        ),
        generates=True,
    )
)
