"""Gemma 2 (arXiv 2408.00118) and Gemma 3's text model (arXiv 2503.19786): four norms a layer, soft-capped logits,
sliding layers.

The norm behind a sub-layer turns zeros into zeros, so that both of a sub-layer's norms leave with it. A soft mask on a
whole attention or FFN is seen by that norm, which divides it out again but for its epsilon: 0/1 masks there are exact,
learned ones have hardly a gradient.

No hidden axis. These norms multiply by 1 + weight and call their epsilon `eps`, and the embedding is scaled by the root
of the config's hidden size; the correction in `edit/shrink.py` multiplies weights and leaves that scale out, so fewer
dimensions would not be exact.
"""

from compresso.arch.base import register
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack


def _gemma(name: str, head_norms: tuple[str, ...]) -> Stack:
    parts = Parts(
        attention="self_attn",
        core="self_attn",
        read=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        write="self_attn.o_proj",
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        head_norms=head_norms,
        ffn="mlp",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )
    return Stack(name, ("model.layers", "layers"), parts, generates=True)


GEMMA2 = register(_gemma("gemma2", ()))
GEMMA3 = register(_gemma("gemma3_text", ("self_attn.q_norm", "self_attn.k_norm")))
