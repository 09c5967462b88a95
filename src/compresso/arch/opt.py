"""OPT (arXiv 2205.01068): LayerNorm decoder with learned positions, ReLU FFN and biases; norms first, or behind the
sums (the 350m model).

No hidden axis: LayerNorm subtracts the mean of the residual stream. The 350m model, whose norms lie behind the sums,
has no axis of layers.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

OPT = register(
    Stack(
        name="opt",
        layers=("model.decoder.layers", "decoder.layers"),
        parts=Parts(
            attention="self_attn",
            core="self_attn",
            read=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            write="self_attn.out_proj",
            attention_norms=("self_attn_layer_norm",),
            ffn="",
            up=("fc1",),
            down="fc2",
            ffn_norms=("final_layer_norm",),
            heads=("num_heads",),
            channels="ffn_dim",
        ),
        generates=True,
        norm_first=lambda config: bool(config.do_layer_norm_before),
    )
)
