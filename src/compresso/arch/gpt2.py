"""GPT-2 (Radford et al. 2019): LayerNorm decoder with learned positions; q, k and v from one `Conv1D`, whose weight is
[in, out].

No hidden axis: LayerNorm subtracts the mean of the residual stream. Every linear has a bias, so that no layer may lose
its last head or channel; whole sub-layers and layers can leave. With `scale_attn_by_inverse_layer_idx` the layers that
stay keep the scale of their old place, which a model rebuilt from the config would not.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

GPT2 = register(
    Stack(
        name="gpt2",
        layers=("transformer.h", "h"),
        parts=Parts(
            attention="attn",
            core="attn",
            read=("attn.c_attn",),
            write="attn.c_proj",
            attention_norms=("ln_1",),
            ffn="mlp",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            ffn_norms=("ln_2",),
            heads=("num_heads",),
            widths=("split_size",),
            channels="n_inner",
            packing="blocks",
        ),
        generates=True,
    )
)
