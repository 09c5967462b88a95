"""Mixtral (arXiv 2401.04088): Mistral's attention, and eight experts in every layer of which a token takes two."""

from compresso.arch.base import register
from compresso.arch.moe import MoeDecoder

MIXTRAL = register(MoeDecoder("mixtral", width="intermediate_size"))
