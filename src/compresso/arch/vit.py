"""ViT (arXiv 2010.11929): the vision transformer, with a classifier or none; norms before the sub-layers, biases on
`o_proj` and the FFN.

No hidden axis: LayerNorm subtracts the mean of the residual stream.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

VIT = Stack(
    name="vit",
    layers=("vit.layers", "layers"),
    parts=Parts(
        attention="attention",
        core="attention",
        read=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        write="attention.o_proj",
        attention_norms=("layernorm_before",),
        ffn="mlp",
        up=("mlp.fc1",),
        down="mlp.fc2",
        ffn_norms=("layernorm_after",),
        heads=("num_attention_heads",),
    ),
    generates=False,
)
register(VIT)
