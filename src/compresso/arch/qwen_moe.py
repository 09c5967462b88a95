"""Qwen2-MoE (with a shared expert behind a gate of its own, and biases on q, k and v) and Qwen3-MoE (arXiv 2505.09388,
with norms on queries and keys); layers that their config names have one FFN.
"""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

QWEN2_MOE = register(MoeDecoder("qwen2_moe"))
QWEN3_MOE = register(MoeDecoder("qwen3_moe", head_norms=("q_norm", "k_norm")))
