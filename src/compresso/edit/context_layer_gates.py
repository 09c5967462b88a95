"""Learned gates of one layer: scores of pairs of tokens, and attention under them, with a cache and without one.

What a token drops is the same both ways: without a cache the whole table of gates is computed and its logarithm added
to the mask; with one, keys, values and interaction keys of dropped tokens give their slots back.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresso.core.context_gates import STEP, keep_log_mask, kept_by_steps, least_log_mask, least_scores, others
from compresso.edit.context_apart import Apart
from compresso.edit.context_attention import Seen, additive, context_of
from compresso.edit.context_cache import LIVE, PLACES, at_places, tokens
from compresso.errors import ArchError

INTERACTION_KEYS = "interaction_keys"
"""In the slots of a cache, beside keys and values."""


@dataclass
class Tally:
    """What one layer kept in its last pass without a cache: a sum that may have a gradient, over so many pairs."""

    left: Tensor
    pairs: Tensor
    least: Tensor | None = None
    """The least score of each of them so far, where it is noted."""


class LayerGates(nn.Module):
    """The gates of one layer.

    Args:
        hidden: width of what attention reads.
        rank: r.
        offset: where the offset starts.
        generator: of the projections, normal with standard deviation 1/sqrt(hidden).
    """

    def __init__(self, hidden: int, rank: int, offset: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        size = (hidden, rank)
        self.queries = nn.Parameter(torch.randn(size, generator=generator) / math.sqrt(hidden))
        self.keys = nn.Parameter(torch.randn(size, generator=generator) / math.sqrt(hidden))
        self.offset = nn.Parameter(torch.full((1,), float(offset)))
        self.scale = 1.0
        self.alpha = STEP
        self.by_least = False
        self.noting = False
        self.apart: Apart | None = None
        self.tally: Tally | None = None
        self._query: Tensor | None = None
        self._key: Tensor | None = None

    def read(self, given: Tensor) -> None:
        """Make interaction queries and keys [batch, 1, tokens, r], in the dtype of what is read."""
        if self.queries.device != given.device:
            self.to(given.device)
        with torch.autocast(given.device.type, enabled=False):
            dtype = given.dtype
            self._query = (given @ (self.queries * self.scale).to(dtype)).unsqueeze(1)
            self._key = (given @ (self.keys * self.scale).to(dtype)).unsqueeze(1)

    def raw(self, given: Tensor) -> Tensor:
        """z of all pairs of what attention reads [batch, tokens, hidden], without the offset."""
        self.read(given)
        query, key = self._query, self._key
        assert query is not None and key is not None
        self._query = self._key = None
        return self.scores(query, key) - self.offset

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """z [batch, 1, queries, keys], float32; of double precision, that."""
        with torch.autocast(query.device.type, enabled=False):
            rank, dtype = query.shape[-1], torch.promote_types(query.dtype, torch.float32)
            return query.to(dtype) @ key.to(dtype).transpose(-1, -2) / math.sqrt(rank) + self.offset

    def attend(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Attention under the gates: over the whole table without a cache, over live slots with one."""
        query, key = self._query, self._key
        assert query is not None and key is not None
        self._query = self._key = None
        if seen.layer is None:
            return self._masked(seen, query, key)
        if math.isfinite(self.alpha):
            raise ArchError("gates that still learn keep no cache; call the model with use_cache=False")
        layer, n = seen.layer, query.shape[2]
        chunk = {**seen.chunk, INTERACTION_KEYS: key}
        if n == 1 and layer.slots:
            return self._one(seen, query, chunk)
        context = context_of(seen, chunk, 1)
        z = self.scores(query, context.slots[INTERACTION_KEYS])
        kept = kept_by_steps(z, context.visible & ~context.own)
        output = seen.attend(
            additive(kept & context.visible, context.own), context.slots["keys"], context.slots["values"]
        )
        layer.store(context.slots, kept[:, :, -1] & context.slots[LIVE])
        layer.count(seen.real)
        return output

    def _masked(self, seen: Seen, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Without a cache: log of what is left, added to the mask."""
        z = self.scores(query, key)
        n = z.shape[-1]
        if seen.visible.shape[-1] != n:
            raise ArchError("the model was given tokens that follow a cache without interaction keys; start anew")
        gates = least_log_mask if self.by_least and math.isfinite(self.alpha) else keep_log_mask
        log_mask, left = gates(z, seen.visible, self.alpha)
        pairs = others(seen.visible)
        least = least_scores(z.detach(), seen.visible)[pairs] if self.noting else None
        self.tally = Tally(left, pairs.sum(), least)
        own = torch.eye(n, dtype=torch.bool, device=z.device)
        keys, values = seen.chunk["keys"], seen.chunk["values"]
        found = seen.attend(log_mask.masked_fill(own, 0.0), keys, values)
        if self.apart is None:
            return found
        with torch.no_grad():
            whole = seen.attend(additive(seen.visible, own), keys, values)
        self.apart.compare(found[0], whole[0], seen.real)
        return whole

    def _one(self, seen: Seen, query: Tensor, chunk: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """A single token: drop, then write it into a slot that is free."""
        layer = seen.layer
        assert layer is not None
        past = layer.slots
        visible = at_places(seen.visible, past[PLACES]).squeeze(2) & past[LIVE]
        kept = (self.scores(query, past[INTERACTION_KEYS]).squeeze(2) > 0) | ~visible
        place = torch.tensor([layer.seen], device=query.device)
        slot = layer.put(tokens(chunk, place, seen.real, 1), kept)
        layer.count(seen.real)
        slots = layer.slots
        own = torch.zeros_like(slots[LIVE]).scatter_(-1, slot, True).unsqueeze(2)
        allowed = at_places(seen.visible, slots[PLACES]) & slots[LIVE].unsqueeze(2)
        output = seen.attend(additive(allowed, own), slots["keys"], slots["values"])
        layer.tighten()
        return output
