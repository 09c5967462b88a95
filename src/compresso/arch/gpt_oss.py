"""gpt-oss (OpenAI, 2025): experts with biases, gate and up by turns; attention sinks, one a head, with which heads
stay.
"""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

GPT_OSS = register(MoeDecoder("gpt_oss", width="intermediate_size", heads_stay=True, gives_scores=True))
