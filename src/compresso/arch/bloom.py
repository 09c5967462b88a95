"""BLOOM (arXiv 2211.05100): LayerNorm decoder with ALiBi (arXiv 2108.12409); one linear holds, head by head, q, k, v.

All heads stay. ALiBi gives head number i of n the slope 2^(-8 i / n), which the stock model computes once for all
layers from the config's count: with fewer heads those that stay would get slopes that they were not trained with, and a
layer of its own count would not run. No config field holds slopes, so there is no form to write such a model in. Whole
attentions, FFNs and layers leave exactly, and so do FFN channels in the live model; a stock checkpoint holds no other
FFN than one of four times the hidden size, so that only whole layers, or zeros and roundings, can be written.

No hidden axis: LayerNorm subtracts the mean of the residual stream. Attention and FFN are given the stream and return
their sum with it. With `apply_residual_connection_post_layernorm` the norms feed the sums as well; they stay, and such
a model has no axis of layers.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

BLOOM = register(
    Stack(
        name="bloom",
        layers=("transformer.h", "h"),
        parts=Parts(
            attention="self_attention",
            core="self_attention",
            read=("self_attention.query_key_value",),
            write="self_attention.dense",
            attention_norms=("input_layernorm",),
            ffn="mlp",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            ffn_norms=("post_attention_layernorm",),
            heads=("num_heads",),
            channels="",
            packing="heads",
            heads_stay=True,
            adds_stream=True,
        ),
        generates=True,
        norm_first=lambda config: not config.apply_residual_connection_post_layernorm,
    )
)
