"""OLMoE (arXiv 2409.02060): 64 small experts, of which a token takes eight. Its norms on queries and keys run over all
heads, so that these stay.
"""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

OLMOE = register(MoeDecoder("olmoe", width="intermediate_size", heads_stay=True))
