"""DeepSeek-V3 (arXiv 2412.19437) and GLM-4-MoE (arXiv 2508.06471): sigmoid routers with a correction for the choice
alone and perhaps groups, shared experts, dense first layers.

DeepSeek's attention keeps one compressed vector a token, from which all heads are made: it stays whole.
"""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

DEEPSEEK_V3 = register(
    MoeDecoder(
        "deepseek_v3",
        read=("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
        inner=("q_b_proj", "kv_b_proj"),
        heads_stay=True,
        cached=("kv_a_proj_with_mqa",),
    )
)
GLM4_MOE = register(MoeDecoder("glm4_moe", head_norms=("q_norm", "k_norm")))
