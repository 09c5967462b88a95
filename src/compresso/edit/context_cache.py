"""A cache whose slots are given back: keys and values of tokens that a layer dropped make room for later ones.

A slot holds one token of one sample, in one group of key/value heads that drop together (all heads of a layer under
learned gates). Which token that is stands beside it, as its place in the sequence, padding counted: keys were rotated
at their own position before they came here, and a mask over places says what a query may see. So the length that the
model is told is the logical one, and the tensors are as long as the most that are live in any sample, in steps of
`BLOCK`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from compresso.errors import ArchError

BLOCK = 64
"""Slots that a layer grows and shrinks by."""
LIVE, PLACES, KEYS, VALUES = "live", "places", "keys", "values"
"""Slots [batch, groups, slots] that are taken, the place of each, and [batch, heads, slots, width]."""


class ContextLayer(CacheLayerMixin):
    """The slots of one layer.

    Attributes:
        slots: tensors by name, `LIVE`, `PLACES`, `KEYS`, `VALUES` and what else is remembered of a token, the third
            dimension of each being slots; empty before the first token.
        seen: logical length, padding counted.
        real: tokens of each sample that were no padding [batch], int64.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[str, Tensor] = {}
        self.seen = 0
        self.real: Tensor | None = None
        self._expected = False

    def expect(self) -> None:
        """The patched attention is about to hand over keys and values, and will store them itself."""
        self._expected = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hand the chunk's keys and values through; the patched attention stores them.

        Raises:
            ArchError: the model is not one whose context is pruned.
        """
        if not self._expected:
            raise ArchError(
                "a ContextCache was given to a model whose context is not pruned; open it by compresso.load, or give"
                " another cache"
            )
        self._expected = False
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: slots are taken as tokens come."""

    @property
    def capacity(self) -> int:
        """Slots there are, of each sample and group."""
        return self.slots[LIVE].shape[2] if self.slots else 0

    def count(self, real: Tensor) -> None:
        """Tokens that came [batch, tokens], bool, whether each is no padding."""
        n = real.sum(-1)
        self.real = n if self.real is None else self.real + n
        self.seen += real.shape[1]

    def with_chunk(self, chunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The slots with a chunk of tokens behind them, not stored."""
        if not self.slots:
            return dict(chunk)
        return {name: torch.cat([tensor, chunk[name]], dim=2) for name, tensor in self.slots.items()}

    def store(self, slots: Mapping[str, Tensor], kept: Tensor) -> None:
        """Take over what is kept of `slots`, as tightly as it fits, in order of time.

        kept: [batch, groups, slots], bool.
        """
        most = int(kept.sum(-1).max()) if kept.numel() else 0
        capacity = max(1, math.ceil(most / BLOCK)) * BLOCK
        places = slots[PLACES].masked_fill(~kept, torch.iinfo(torch.int64).max)
        order = places.argsort(dim=-1, stable=True)[..., :capacity]
        short = capacity - order.shape[-1]
        found = {name: _padded(_taken(tensor, order), short) for name, tensor in slots.items()}
        found[LIVE] = _padded(kept.gather(-1, order), short)
        self.slots = found

    def put(self, one: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        """Give back slots that are not kept and write one token into the first free slot of each sample and group;
        another block is taken where there is none.

        Args:
            one: tensors of a single slot.
            kept: [batch, groups, slots], bool.

        Returns:
            Where it lies [batch, groups, 1].
        """
        live = self.slots[LIVE] & kept
        if bool(live.all(-1).any()):
            self.slots = {name: _padded(tensor, BLOCK) for name, tensor in self.slots.items()}
            live = _padded(live, BLOCK)
        slot = (~live).to(torch.uint8).argmax(-1, keepdim=True)
        self.slots[LIVE] = live
        for name, tensor in self.slots.items():
            tensor.scatter_(2, _wide(slot, tensor), one[name])
        return slot

    def drop(self, kept: Tensor) -> None:
        """Give back slots that are not kept [batch, groups, slots]; blocks that nobody needs are freed."""
        self.slots[LIVE] = self.slots[LIVE] & kept
        self.tighten()

    def tighten(self) -> None:
        """Free memory once two blocks more are there than any sample needs."""
        live = self.slots[LIVE]
        if self.capacity - int(live.sum(-1).max()) >= 2 * BLOCK:
            self.store(self.slots, live)

    def live_tokens(self) -> Tensor:
        """Tokens that are held [batch, groups], int64."""
        return self.slots[LIVE].sum(-1)

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are over places."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """None."""
        return -1

    def reset(self) -> None:
        """Free everything."""
        self.slots, self.seen, self.real, self._expected = {}, 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped does not come back. Raises ArchError."""
        if tokens_to_remove:
            raise ArchError(
                "a pruned context cannot be taken back by some tokens, as assisted decoding wants; generate without an"
                " assistant"
            )

    def offload(self) -> None:
        """Refused. Raises ArchError."""
        raise ArchError("a pruned context is not offloaded; leave cache_implementation out")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Samples in another order, for beam search."""
        self._of_samples(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample so many times."""
        self._of_samples(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these samples."""
        self._of_samples(lambda tensor: tensor[indices.to(tensor.device)])

    def _of_samples(self, change: Any) -> None:
        self.slots = {name: change(tensor) for name, tensor in self.slots.items()}
        self.real = None if self.real is None else change(self.real)


class ContextCache(Cache):
    """A cache for a model whose context is pruned, by learned gates or by a rule.

    Args:
        n_layers: of the model.
    """

    layers: list[ContextLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[ContextLayer() for _ in range(n_layers)])

    def allocated_bytes(self) -> int:
        """Bytes of all tensors of all layers, padding and bookkeeping counted."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.slots.values())

    def live_bytes(self) -> int:
        """Bytes that keys, values and interaction keys of live tokens alone would take."""
        return sum(_live_bytes(layer.slots) for layer in self.layers if layer.slots)

    def live_fraction(self) -> float:
        """Tokens held of tokens seen, padding not counted, over all layers, groups and samples; 1 before the first."""
        shares = [
            float((layer.live_tokens() / layer.real.clamp(min=1).unsqueeze(-1)).mean())
            for layer in self.layers
            if layer.slots and layer.real is not None
        ]
        return sum(shares) / len(shares) if shares else 1.0


def tokens(names: Mapping[str, Tensor], places: Tensor, real: Tensor, groups: int) -> dict[str, Tensor]:
    """A chunk as slots.

    Args:
        names: tensors [batch, heads, tokens, width] or [batch, groups, tokens].
        places: of its tokens [tokens].
        real: whether each is no padding [batch, tokens].
        groups: that drop on their own.
    """
    batch, n = real.shape
    return {
        **names,
        PLACES: places.view(1, 1, n).expand(batch, groups, n).contiguous(),
        LIVE: real.unsqueeze(1).expand(batch, groups, n).contiguous(),
    }


def at_places(visible: Tensor, places: Tensor) -> Tensor:
    """What queries see of slots [batch, groups, queries, slots].

    visible: [batch, 1, queries, places], bool. places: of slots [batch, groups, slots].
    """
    batch, groups, n = places.shape
    queries = visible.shape[2]
    whole = visible.expand(batch, groups, -1, -1)
    return whole.gather(-1, places.unsqueeze(2).expand(batch, groups, queries, n))


def _live_bytes(slots: Mapping[str, Tensor]) -> int:
    """Of one layer."""
    live = slots[LIVE]
    found = 0
    for name, tensor in slots.items():
        if name not in (LIVE, PLACES) and tensor.dim() == 4:
            heads = tensor.shape[1] // live.shape[1]
            found += int(live.sum()) * heads * tensor.shape[3] * tensor.itemsize
    return found


def _wide(index: Tensor, tensor: Tensor) -> Tensor:
    """An index [batch, groups, n] as `gather` and `scatter_` along slots of a tensor want it."""
    each = tensor.shape[1] // index.shape[1]
    wide = index.repeat_interleave(each, dim=1) if each > 1 else index
    return wide if tensor.dim() == 3 else wide.unsqueeze(-1).expand(*wide.shape, tensor.shape[3])


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(2, _wide(index, tensor))


def _padded(tensor: Tensor, more: int) -> Tensor:
    """With so many empty slots behind."""
    sides: Sequence[int] = (0, more) if tensor.dim() == 3 else (0, 0, 0, more)
    return pad(tensor, list(sides)) if more else tensor
