"""Whether a model with learned gates on its context says through the cache that frees what it says without one.

A row of `compresso verify` beside those of engines, which open the weights and know nothing of the gates. Both ways are
computed in float64, because a score that rounding puts on the other side of 0 drops another token.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.context import positions_of
from compresso.checkpoint.load import load_model, numbers_of
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.edit.context_attention import keepers_of
from compresso.edit.context_cache import ContextCache
from compresso.engines.parity import Parity, ids_of, judged, within_rounding
from compresso.engines.transformers_process import NEW_TOKENS, continued
from compresso.metrics.pruned_context import hold_context_
from compresso.sweep.memory import available

NAME = "compresso.load, pruned context"
UNGATED = "without its gates: with the whole cache"
"""What is said of engines that open such a model."""
TOKENS, FIRST = 64, 16
"""Of the text, and of these read in one chunk before tokens come one by one."""
WITHIN = 1e-4


def context_parity(source: Source) -> Parity:
    """Decode a text token by token through the cache, alone and beside a shorter one with padding before it, and
    compare it with the forward that masks what the gates drop.
    """
    needed, there = 8 * numbers_of(source), available(torch.device("cpu"))
    if 1.2 * needed > there:
        reason = f"one copy in float64 needs {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are there"
        return Parity(NAME, "not checked", reason)
    model = load_model(source, dtype=torch.float64)
    hold_context_(model, source, None)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    ids = ids_of(tokenizer, model.config.vocab_size)
    n = min(TOKENS, (positions_of(model.config) or TOKENS + NEW_TOKENS) - NEW_TOKENS)
    return compared(model.eval(), ids.repeat(n // len(ids) + 1)[:n])


def compared(model: PreTrainedModel, ids: Tensor) -> Parity:
    """The same of a live model with gates, and token ids [tokens]."""
    n = len(ids)
    rows, mask = torch.stack([ids, ids.roll(n // 3)]), torch.ones(2, n, dtype=torch.long)
    mask[1, : n // 2] = 0
    wanted, (found, held) = _masked(model, rows, mask), _decoded(model, rows, mask)
    real = mask.bool()
    difference = float((found - wanted)[real].abs().max())
    _, greedy = continued(model, ids)
    fits = within_rounding(found[real], wanted[real], WITHIN)
    said = judged(NAME, difference, fits, _greedy(model, ids), greedy.tolist(), "logits with and without the cache")
    told = f"token by token as the masked forward, {held.live_fraction():.0%} of {n} tokens live"
    return said if said.reason else replace(said, reason=told)


@torch.no_grad()
def _masked(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [batch, tokens, vocab] of one forward."""
    return model(input_ids=ids, attention_mask=mask, position_ids=_places(mask), use_cache=False).logits


@torch.no_grad()
def _decoded(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, ContextCache]:
    """The same through the cache, a chunk and then token by token, and the cache."""
    held, parts, n = ContextCache(len(keepers_of(model))), [], ids.shape[1]
    first = min(FIRST, n)
    for start, end in [(0, first), *((i, i + 1) for i in range(first, n))]:
        given = {"attention_mask": mask[:, :end], "position_ids": _places(mask)[:, start:end]}
        parts.append(model(input_ids=ids[:, start:end], past_key_values=held, **given).logits)
    return torch.cat(parts, dim=1), held


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: Tensor) -> list[int]:
    """The likeliest next ids, one after the other, through the cache."""
    held, said, given = ContextCache(len(keepers_of(model))), [], ids.unsqueeze(0)
    for _ in range(NEW_TOKENS):
        given = model(input_ids=given, past_key_values=held).logits[:, -1:].argmax(-1)
        said.append(int(given))
    return said


def _places(mask: Tensor) -> Tensor:
    """Positions of tokens [batch, tokens], padding not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
