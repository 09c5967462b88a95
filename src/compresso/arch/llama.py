"""Llama: the plain decoder; multi-head or grouped-query attention, tied or untied head, optional biases on either
sub-layer.
"""

from compresso.arch.base import register
from compresso.arch.decoder import Decoder

LLAMA = register(Decoder("llama"))
