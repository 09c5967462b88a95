"""DeepSeek-V2 (arXiv 2405.04434): softmax routers, perhaps limited to groups, shared experts, dense first layers.

A token may choose from the groups whose best expert scores highest (`topk_method: group_limited_greedy`), or from all
(`greedy`, V2-Lite), whatever `n_group` says. There is no correction for the choice, and weights are not divided by
their sum. Attention keeps one compressed vector a token, from which all heads are made: it stays whole.

Of transformers 5.23's class: it never reads `norm_topk_prob`, which is false in all that was published; a config that
has it true is computed as if it were false, here too. Experts outside of the open groups get a score of 0 rather than
minus infinity, so that with fewer experts in the open groups than a token takes it would choose others with weight 0:
`Axis.min_units` keeps enough. Its config wants a hidden size that the number of heads divides.
"""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

DEEPSEEK_V2 = register(
    MoeDecoder(
        "deepseek_v2",
        read=("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
        inner=("q_b_proj", "kv_b_proj"),
        heads_stay=True,
        cached=("kv_a_proj_with_mqa",),
    )
)
