"""Qwen2: the plain decoder with biases on q, k and v, which leave with their heads, and a sliding window in some
layers.
"""

from compresso.arch.base import register
from compresso.arch.decoder import Decoder

QWEN2 = register(Decoder("qwen2"))
