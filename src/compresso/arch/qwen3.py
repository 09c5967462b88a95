"""Qwen3: the plain decoder with RMSNorms of width head_dim on queries and keys, shared by all heads of a layer."""

from compresso.arch.base import register
from compresso.arch.decoder import Decoder

QWEN3 = register(Decoder("qwen3", head_norms=("q_norm", "k_norm")))
