"""Mistral: the plain decoder with a sliding window in every layer or in none, and no biases."""

from compresso.arch.base import register
from compresso.arch.decoder import Decoder

MISTRAL = register(Decoder("mistral"))
