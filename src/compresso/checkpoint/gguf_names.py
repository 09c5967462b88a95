"""Which parameter of transformers each tensor of a GGUF file is, and what was done to it on the way in.

`llama` and `deci` files have the rows of q and k so that neighbouring pairs of a head turn together; transformers turns
its two halves. Gemma's norms are stored with the 1 that its code adds.
"""

import re
from dataclasses import dataclass

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
_PARTS = {
    **{name: f"self_attn.{part}" for name, part in _ATTENTION.items()},
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)")
FACTORS = "rope_freqs.weight"
TURNED = ("llama", "deci")
"""Architectures whose rows of q and k are in the order of neighbouring pairs."""
OFFSET = ("gemma", "gemma2", "gemma3")
"""Architectures whose norms are stored with 1 added."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from.

    Args:
        stored: the tensor's name in the file.
        layer: its number; None for what no layer owns.
        turned: whether its rows are in pairs: of "query" or of "kv" heads; "" if they are not.
        offset: what is to be taken from each number.
    """

    stored: str
    layer: int | None = None
    turned: str = ""
    offset: float = 0.0


def parameter_of(stored: str, arch: str) -> tuple[str, Source] | None:
    """Name of the parameter that a tensor is, and where it comes from; None for a name that the architecture has not.

    >>> parameter_of("blk.3.attn_q.weight", "llama")[0]
    'model.layers.3.self_attn.q_proj.weight'
    """
    offset = 1.0 if arch in OFFSET and "norm." in stored else 0.0
    base, _, suffix = stored.rpartition(".")
    if base in _WHOLE and suffix == "weight":
        return f"{_WHOLE[base]}.weight", Source(stored, offset=offset)
    if (match := _BLOCK.fullmatch(stored)) is None:
        return None
    layer, part, suffix = int(match[1]), match[2], match[3]
    parts = _PARTS | (_GEMMA_NORMS if arch in ("gemma2", "gemma3") else _NORMS)
    if part not in parts:
        return None
    turned = {"attn_q": "query", "attn_k": "kv"}.get(part, "") if arch in TURNED else ""
    return f"model.layers.{layer}.{parts[part]}.{suffix}", Source(stored, layer, turned, offset)
