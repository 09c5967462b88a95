"""Caches that forget by a rule, without training: put on a model as learned gates are, so that they are compared at the
same live share.

    window    the first 4 tokens and the latest ones (StreamingLLM, arXiv 2309.17453)
    knorm     keys of the lowest norm (arXiv 2406.11430)
    keydiff   keys least like the mean key (arXiv 2504.15364)
    h2o       the latest half, and of the others those that drew most attention so far (arXiv 2306.14048)
    snapkv    after a prompt, what its last 32 queries attended to, smoothed (arXiv 2404.14469); decoding drops nothing

A chunk attends to all of itself and to what the cache holds; then the cache is cut down to its budget. Without a cache
nothing is dropped. Key/value heads choose for themselves, but for the window. A token that just came always stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.eviction import best, difference_scores, norm_scores, pooled, recency_scores
from compresso.edit.context_attention import Seen, additive, context_of, hold_
from compresso.edit.context_cache import LIVE, PLACES, at_places, tokens
from compresso.errors import ArgumentError

Rule = Literal["window", "knorm", "keydiff", "h2o", "snapkv"]
RULES = get_args(Rule)
SINKS, RECENT, POOL = 4, 32, 7
DRAWN = "drawn"
"""Attention that a token drew so far, in the slots of `h2o`."""


@dataclass(frozen=True)
class Eviction:
    """A rule and how much it leaves.

    Args:
        rule: see above.
        keep: below 1 a share of the tokens seen, else a number of tokens.
    """

    rule: Rule
    keep: float

    def budget(self, real: Tensor) -> Tensor:
        """Tokens that may stay of those seen [batch], int64, at least one."""
        if self.keep < 1:
            return (real * self.keep).ceil().long().clamp(min=1)
        return torch.full_like(real, int(self.keep))


def parse(text: str) -> Eviction:
    """An eviction from text such as "keydiff:0.5" or "window:256".

    Raises:
        ArgumentError: an unknown rule, or no share and no number of tokens.

    >>> parse("keydiff:0.5")
    Eviction(rule='keydiff', keep=0.5)
    """
    name, _, amount = text.partition(":")
    rule = next((one for one in RULES if one == name), None)
    if rule is None:
        raise ArgumentError(
            f"--cache {text!r}: wanted one of {', '.join(RULES)}, a colon and how much stays, as keydiff:0.5"
        )
    try:
        keep = float(amount)
    except ValueError:
        keep = math.nan
    if not (0 < keep < 1 or (keep >= 1 and keep == int(keep))):
        raise ArgumentError(
            f"--cache {text!r}: wanted a share between 0 and 1 or a whole number of tokens behind the colon, as"
            f" {rule}:0.5 or {rule}:256"
        )
    return Eviction(rule, keep)


def evict_(model: PreTrainedModel, eviction: Eviction) -> None:
    """Give a model a cache that forgets by a rule, in place; learned gates come off.

    Raises ArchError as `hold_`.
    """
    hold_(model, lambda _: _Rule(eviction))


class _Rule:
    """The keeper of one layer."""

    def __init__(self, eviction: Eviction) -> None:
        self.eviction = eviction

    def read(self, given: Tensor) -> None:
        """Nothing: keys say enough."""

    def attend(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Attend to all there is, then cut the cache down."""
        keys = seen.chunk["keys"]
        if seen.layer is None:
            n = keys.shape[2]
            own = torch.eye(n, dtype=torch.bool, device=keys.device)
            return seen.attend(additive(seen.visible, own), keys, seen.chunk["values"])
        layer, n = seen.layer, seen.query.shape[2]
        rule = self.eviction.rule
        groups = 1 if rule == "window" else keys.shape[1]
        chunk = dict(seen.chunk)
        if rule == "h2o":
            chunk[DRAWN] = torch.zeros(*keys.shape[:3], device=keys.device)
        single = n == 1 and bool(layer.slots)
        if single:
            place = torch.tensor([layer.seen], device=keys.device)
            slot = layer.put(tokens(chunk, place, seen.real, groups), layer.slots[LIVE])
            slots = layer.slots
            own = torch.zeros_like(slots[LIVE]).scatter_(-1, slot, True).unsqueeze(2)
            visible = at_places(seen.visible, slots[PLACES]) & slots[LIVE].unsqueeze(2)
        else:
            context = context_of(seen, chunk, groups)
            slots, own, visible = context.slots, context.own, context.visible
        mask = additive(visible, own)
        output = seen.attend(mask, slots["keys"], slots["values"])
        weights = _weights(seen, slots["keys"], mask) if rule in ("h2o", "snapkv") else None
        if rule == "h2o" and weights is not None:
            slots[DRAWN] = slots[DRAWN] + weights.sum(2)
        latest = layer.seen + n - 1
        layer.count(seen.real)
        assert layer.real is not None
        kept = self._kept(slots, layer.real, seen.real, weights, latest, single)
        if single:
            layer.drop(kept)
        else:
            layer.store(slots, kept)
        return output

    def _kept(
        self,
        slots: Mapping[str, Tensor],
        real: Tensor,
        came: Tensor,
        weights: Tensor | None,
        latest: int,
        single: bool,
    ) -> Tensor:
        """Which slots stay [batch, groups, slots], bool."""
        live, places, keys = slots[LIVE], slots[PLACES], slots["keys"]
        budget = self.eviction.budget(real)
        recent = places.float()
        match self.eviction.rule:
            case "window":
                first = places.masked_fill(~live, torch.iinfo(torch.int64).max).amin((1, 2))
                sinks = budget.div(2, rounding_mode="floor").clamp(max=SINKS)
                scores = recency_scores(places, sinks, first)
            case "knorm":
                scores = norm_scores(keys)
            case "keydiff":
                scores = difference_scores(keys, live)
            case "h2o":
                late = best(recent, live, budget.div(2, rounding_mode="floor"))
                scores = slots[DRAWN].masked_fill(late, torch.inf)
            case "snapkv":
                if single or weights is None:
                    return live
                asked = came.flip(-1).cumsum(-1).flip(-1) <= RECENT  # the last queries that are no padding
                drawn = (weights * (asked & came).view(len(came), 1, -1, 1)).sum(2)
                late = best(recent, live, budget.clamp(max=RECENT))
                scores = pooled(drawn, POOL).masked_fill(late, torch.inf)
        return best(scores.masked_fill(places == latest, torch.inf), live, budget)


def _weights(seen: Seen, keys: Tensor, mask: Tensor) -> Tensor:
    """Attention of each key/value head, the mean over its queries' heads [batch, heads, tokens, slots], float32."""
    batch, n_queries, n, width = seen.query.shape
    heads = keys.shape[1]
    query = seen.query.float().view(batch, heads, n_queries // heads, n, width)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", query, keys.float()) * seen.scaling
    return (scores + mask.unsqueeze(2)).softmax(-1).mean(2)
