"""GLM-4 (ChatGLM, arXiv 2406.12793) by the stock classes `Glm` and `Glm4`: a LLaMA whose gate and up come from one
linear, with biases on q, k and v, and rotary positions on half of each head.

RMSNorms, so hidden dimensions can leave. `Glm4` (GLM-4-0414) has a norm behind each sub-layer too. It turns zeros into
zeros, so that both of a sub-layer's norms leave with it. A soft mask on a whole attention or FFN is seen by that norm,
which divides it out again but for its epsilon: 0/1 masks there are exact, learned ones have hardly a gradient.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack


def _glm(name: str, behind_attention: tuple[str, ...], behind_ffn: tuple[str, ...]) -> Stack:
    parts = Parts(
        attention="self_attn",
        core="self_attn",
        read=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        write="self_attn.o_proj",
        attention_norms=("input_layernorm", *behind_attention),
        ffn="mlp",
        up=("mlp.gate_up_proj",),
        down="mlp.down_proj",
        ffn_norms=("post_attention_layernorm", *behind_ffn),
        fused_up=2,
    )
    return Stack(name, ("model.layers", "layers"), parts, generates=True, final_norm=("model.norm", "norm"))


GLM = register(_glm("glm", (), ()))
GLM4 = register(_glm("glm4", ("post_self_attn_layernorm",), ("post_mlp_layernorm",)))
