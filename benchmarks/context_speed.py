"""Bytes of a cache that forgets, and decode speed behind a long context, for `benchmarks/context.py speed`.

Reading thousands of tokens for each of 32 samples would take most of the time and tell nothing of decoding. With
`--filled` caches are therefore filled with random keys and values: dense with the whole context, others with the share
of it that stays, at the latest places. A rule then decides at each step as it always does. Gates are held open by their
offset, so that the share stays; the work of a step, scores of interaction keys and all, is the same. Seconds are then
those of processor time that the process itself had, which other work on the machine lengthens less than it does others.
"""

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from compresso.edit.context_attention import keepers_of, release_
from compresso.edit.context_cache import ContextCache, ContextLayer, tokens
from compresso.edit.context_gates import ContextGates, rank_for
from compresso.edit.context_layer_gates import INTERACTION_KEYS
from compresso.edit.evict import DRAWN, evict_, parse
from compresso.metrics.pruned_context import held_share
from compresso.metrics.timed_generation import prefill_and_decode, prompts, stopwatch
from compresso.metrics.traffic import cache_bytes

DRAWN_TOKENS = 256
"""Of random keys and values, which are then repeated."""
OPEN = 1e4
"""An offset of gates that drop nothing."""


@dataclass
class Turn:
    """Seconds of decoding, and bytes and share of tokens of the cache in the end."""

    seconds: float = 0.0
    size: int = 0
    live: float = 1.0

    def look(self, cache: Any) -> None:
        """Note what a cache holds."""
        self.size, self.live = cache_bytes(cache), held_share(cache)


def put_(model: PreTrainedModel, method: str, share: float) -> None:
    """Put a method on a model: "dense", "gates" (random ones, open) or a rule."""
    if method == "gates":
        ContextGates(model, rank_for(model), OPEN, 0).requires_grad_(False).hold_(model)
    elif method != "dense":
        evict_(model, parse(f"{method}:{share}"))


def read(model: PreTrainedModel, batch: int, context: int, new_tokens: int) -> Turn:
    """Read a random prompt and decode, once."""
    found = Turn()
    ids = prompts(batch, context, model.config.vocab_size, 0)
    _, found.seconds, _ = prefill_and_decode(model, ids, new_tokens, stopwatch(model.device), found.look)
    return found


@torch.inference_mode()
def filled(model: PreTrainedModel, method: str, share: float, batch: int, context: int, new_tokens: int) -> Turn:
    """Decode behind a filled cache, once; a step before the clock starts."""
    found, cache = Turn(), cache_of(model, method, share, batch, context)
    ids = prompts(batch, 1, model.config.vocab_size, 0)

    def decode(steps: int) -> None:
        nonlocal ids
        for _ in range(steps):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    decode(1)
    started = time.process_time()
    decode(new_tokens)
    found.seconds = time.process_time() - started
    found.look(cache)
    return found


def cache_of(model: PreTrainedModel, method: str, share: float, batch: int, context: int) -> Cache:
    """A cache of random keys and values after `context` tokens, for a model that the method is put on."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    heads = int(config.num_key_value_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def drawn(groups: int, n: int, size: int) -> Tensor:
        once = torch.randn(1, groups, DRAWN_TOKENS, size, generator=generator, dtype=model.dtype)
        return once.repeat(batch, 1, math.ceil(n / DRAWN_TOKENS), 1)[:, :, :n].contiguous()

    if method == "dense":
        dense = DynamicCache(config=config)
        for i in range(config.num_hidden_layers):
            dense.update(drawn(heads, context, width), drawn(heads, context, width), i)
        return dense
    cache, n = ContextCache(len(keepers_of(model))), math.ceil(share * context)
    real, places = torch.ones(batch, n, dtype=torch.bool), torch.arange(context - n, context)
    for layer in cache.layers:
        chunk = {"keys": drawn(heads, n, width), "values": drawn(heads, n, width)}
        if method == "gates":
            chunk[INTERACTION_KEYS] = drawn(1, n, rank_for(model))
        if method == "h2o":
            chunk[DRAWN] = torch.zeros(batch, heads, n)
        fill_(layer, tokens(chunk, places, real, 1 if method in ("gates", "window") else heads), batch, context)
    return cache


def fill_(layer: ContextLayer, slots: dict[str, Tensor], batch: int, context: int) -> None:
    """Let a layer hold these slots after so many tokens."""
    layer.store(slots, slots["live"])
    layer.count(torch.ones(batch, context, dtype=torch.bool))


def whole_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """Bytes of keys and values of a dense cache, computed."""
    config = model.config
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    each = 2 * int(config.num_key_value_heads) * width * torch.empty(0, dtype=model.dtype).itemsize
    return batch * context * int(config.num_hidden_layers) * each


def turn(model: PreTrainedModel, method: str, options: argparse.Namespace, batch: int, context: int) -> Turn:
    """One method at one size, once; it is taken off again."""
    put_(model, method, options.share)
    try:
        if options.filled:
            return filled(model, method, options.share, batch, context, options.new_tokens)
        return read(model, batch, context, options.new_tokens)
    finally:
        release_(model)
