"""Learned gates on the context of each layer (Dynamic Context Pruning, arXiv 2305.15805, section 3), as a forward patch
with tensors.

In each layer, interaction queries and keys of what its attention reads (no positions, no bias) score pairs of tokens;
where a score plus the layer's offset is not above 0, the later token drops the earlier one from this layer for good.
With a cache the dropped token's slot is given back; without one the whole table of gates is computed, with the same
result. One gate serves all heads of a layer, so that groups of key/value heads drop together.

What differs from the public code: queries at padding drop nothing, so that padding in the middle of a sequence leaves
no trace; chunks that follow a cache see its live tokens alone; one code serves rotary and learned positions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.context_gates import STEP, keep_log_mask, kept_by_steps, least_log_mask, least_scores, others
from compresso.edit.context_attention import (
    Seen,
    additive,
    attentions_of,
    context_of,
    hold_,
    keepers_of,
    refuse_foreign,
    release_,
)
from compresso.edit.context_cache import LIVE, PLACES, at_places, tokens
from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

PATCH = "context_gates"
QUERIES, INTERACTION_KEYS, OFFSETS = "queries", "interaction_keys", "offsets"
_OUTPUTS = ("o_proj", "c_proj", "dense")
FEW_HEADS = 4
"""With no more key/value heads than this, interaction keys would be a large part of the cache."""


@dataclass
class Tally:
    """What one layer kept in its last pass without a cache: a sum that may have a gradient, over so many pairs."""

    left: Tensor
    pairs: Tensor
    least: Tensor | None = None
    """The least score of each of them so far, where it is noted."""


class Apart:
    """What the gates of one layer change there, the layers before it being as they are without gates.

    Attributes:
        error: mean over real tokens of |gated - whole|^2 / |stream|^2 [], of what attention adds to the stream that
            it is added to; of the last pass.
    """

    def __init__(self, attention: nn.Module, block: nn.Module) -> None:
        self._output = next(getattr(attention, part) for part in _OUTPUTS if hasattr(attention, part))
        self._squares: Tensor | None = None
        self._hook = block.register_forward_pre_hook(self._look, with_kwargs=True)
        self.error: Tensor | None = None

    def _look(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream = arguments[0] if arguments else named["hidden_states"]
        self._squares = stream.detach().float().square().sum(-1)

    def compare(self, gated: Tensor, whole: Tensor, real: Tensor) -> None:
        """Note the error of outputs [batch, tokens, heads, width], at tokens that are real [batch, tokens]."""
        assert self._squares is not None
        change = (gated - whole).flatten(2)
        added = self._output(change) - self._output(torch.zeros_like(change[:1, :1]))  # without its bias
        share = added.float().square().sum(-1) / self._squares.clamp(min=1e-12)
        self.error = (share * real).sum() / real.sum().clamp(min=1)

    def end(self) -> None:
        """Look no longer."""
        self._hook.remove()


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


class ContextGates(nn.Module):
    """The gates of all layers of a model, which learn; of any alpha.

    Args:
        model: whose attention is patched as long as they are on it.
        rank: of interaction queries and keys.
        offset: start of each layer's.
        seed: of the projections.

    Raises ArchError as `hold_`.
    """

    def __init__(self, model: PreTrainedModel, rank: int, offset: float, seed: int) -> None:
        super().__init__()
        refuse_foreign(model)
        hidden = int(model.config.hidden_size)
        generator = torch.Generator().manual_seed(seed)
        layers = range(len(attentions_of(model)))
        self.layers = nn.ModuleList(LayerGates(hidden, rank, offset, generator) for _ in layers)

    def hold_(self, model: PreTrainedModel) -> None:
        """Put them on a model."""
        hold_(model, dict(enumerate(self.gates)))

    @torch.no_grad()
    def spread_(self, model: PreTrainedModel, batch: Mapping[str, Tensor], spread: float) -> None:
        """Scale what each layer's projections give so that scores of pairs of a batch have this standard deviation.

        How large they are otherwise depends on the norms before attention. The projections stay as they are drawn, so
        that one rate suits all layers. Gates must not be held yet.
        """
        visible = batch["attention_mask"].bool().to(model.device)
        n = visible.shape[1]
        pairs = visible.unsqueeze(1) & visible.unsqueeze(2) & visible.new_ones(n, n).tril(-1)

        def scaling(gate: LayerGates) -> Any:
            def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                z = gate.raw(arguments[0] if arguments else named["hidden_states"]).squeeze(1)
                gate.scale *= float((spread / z[pairs].std().clamp(min=1e-6)).sqrt())

            return hook

        attentions = attentions_of(model)
        hooks = [
            module.register_forward_pre_hook(scaling(gate), with_kwargs=True)
            for module, gate in zip(attentions, self.gates, strict=True)
        ]
        try:
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model.base_model(**given, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def gates(self) -> list[LayerGates]:
        """In the order of layers."""
        return [one for one in self.layers if isinstance(one, LayerGates)]

    def at(self, alpha: float, by_least: bool = False) -> None:
        """Set alpha of all gates; under `by_least` the sharpness of one logistic gate on a token's least score."""
        for one in self.gates:
            one.alpha, one.by_least = alpha, by_least

    @contextmanager
    def apart(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context each layer runs with its whole context, and notes what its gates would change there."""
        blocks = arch_for(model.config).blocks(model)
        for one, attention, block in zip(self.gates, attentions_of(model), blocks, strict=True):
            one.apart = Apart(attention, block)
        try:
            yield
        finally:
            for one in self.gates:
                if one.apart is not None:
                    one.apart.end()
                one.apart = None

    def error(self) -> Tensor:
        """What gates changed in the last pass within `apart`, the sum over layers [], float32."""
        found = [one.apart.error for one in self.gates if one.apart is not None and one.apart.error is not None]
        return torch.stack(found).sum()

    def live(self) -> Tensor:
        """The share of real entries (seen pairs, a token's own left out) that was kept in the last pass without a
        cache, the mean over layers [], float32.
        """
        found = [one.tally.left / one.tally.pairs.clamp(min=1) for one in self.gates if one.tally is not None]
        return torch.stack(found).mean()

    def patch(self) -> Patch:
        """The forward patch that they are once trained."""
        gates = self.gates
        return Patch(
            PATCH,
            {"rank": gates[0].queries.shape[1], "layers": len(gates)},
            {
                QUERIES: torch.stack([one.queries.detach() * one.scale for one in gates]),
                INTERACTION_KEYS: torch.stack([one.keys.detach() * one.scale for one in gates]),
                OFFSETS: torch.cat([one.offset.detach() for one in gates]),
            },
        )


LANDINGS, SPARE = 6, 0.002
"""Passes after which offsets stay, and how much above a target is near enough."""
USUAL_LANDINGS = 3
"""Passes that it takes mostly."""


@torch.no_grad()
def land_(
    model: PreTrainedModel, gates: ContextGates, batches: Sequence[Mapping[str, Tensor]], target: float
) -> tuple[float, list[float]]:
    """Shift all offsets of step gates, which are held on the model, until just over `target` of the context of batches
    is live.

    A key is live while its least score is above 0, so that the shift is a quantile of least scores. What is dropped
    changes what later layers read, which a few passes settle.

    Returns:
        The shift, and what is live in each layer.
    """
    starts = [gate.offset.clone() for gate in gates.gates]
    found: list[tuple[float, float, list[float]]] = []
    shift, step, least = 0.0, 0.01, list[Tensor]()
    while len(found) < LANDINGS or not any(share >= target for share, _, _ in found):
        for gate, start in zip(gates.gates, starts, strict=True):
            gate.offset.copy_(start + shift)
        least.clear()
        live = live_by_layer(model, gates, batches, least)
        share = sum(live) / len(live)
        found.append((share, shift, live))
        if 0 <= share - target <= 2 * SPARE:
            break
        if len(found) < LANDINGS:
            known = torch.cat(least)
            place = min(len(known), max(1, int((1 - min(1.0, target + SPARE)) * len(known))))
            shift -= float(known.kthvalue(place).values)
        else:
            shift, step = max(one for _, one, _ in found) + step, 2 * step
    _, shift, live = min(one for one in found if one[0] >= target)
    for gate, start in zip(gates.gates, starts, strict=True):
        gate.offset.copy_(start + shift)
    return shift, live


def live_by_layer(
    model: PreTrainedModel,
    gates: ContextGates,
    batches: Sequence[Mapping[str, Tensor]],
    least: list[Tensor] | None = None,
) -> list[float]:
    """The share of real entries that each layer keeps on batches, the gates being held on the model.

    least: takes the least score so far of each of those entries, if given.
    """
    left, pairs = [0.0] * len(gates.gates), [0.0] * len(gates.gates)
    for one in gates.gates:
        one.noting = least is not None
    with torch.no_grad():
        for batch in batches:
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model.base_model(**given, use_cache=False)
            for i, one in enumerate(gates.gates):
                assert one.tally is not None
                left[i] += float(one.tally.left)
                pairs[i] += float(one.tally.pairs)
                if least is not None and one.tally.least is not None:
                    least.append(one.tally.least.float())
                    one.tally.least = None
    for one in gates.gates:
        one.noting = False
    return [kept / max(of, 1) for kept, of in zip(left, pairs, strict=True)]


def rank_for(model: PreTrainedModel) -> int:
    """64 as published; 32 where few key/value heads make a cache so small that 64 would be a large part of it."""
    heads = min(shape for shape in _kv_heads(model) if shape)
    return 32 if heads <= FEW_HEADS else 64


def _kv_heads(model: PreTrainedModel) -> list[int]:
    return [shape.kv_heads for shape in arch_for(model.config).shapes(model)]


def gates_of(patch: Patch, model: PreTrainedModel) -> ContextGates:
    """The gates of a patch, as steps and without gradients. Raises ArchError where they do not fit the model."""
    queries, keys, offsets = (patch.tensors[name] for name in (QUERIES, INTERACTION_KEYS, OFFSETS))
    hidden, layers = int(model.config.hidden_size), len(attentions_of(model))
    wanted = [layers, hidden, int(patch.params["rank"])]
    if list(queries.shape) != wanted or list(keys.shape) != wanted or list(offsets.shape) != [layers]:
        raise ArchError(
            f"gates {list(queries.shape)} on a context; wanted {wanted}: layers, hidden size and rank of this model"
        )
    gates = ContextGates(model, wanted[2], 0.0, 0)
    with torch.no_grad():
        for i, one in enumerate(gates.gates):
            one.queries.copy_(queries[i])
            one.keys.copy_(keys[i])
            one.offset.copy_(offsets[i : i + 1])
    return gates.requires_grad_(False).eval()


def _apply_(model: PreTrainedModel, patch: Patch) -> None:
    gates_of(patch, model).to(model.device).hold_(model)


def live_fraction(model: PreTrainedModel) -> float | None:
    """Of the last pass without a cache; None where no gates are held or none ran."""
    found = [one.tally for one in keepers_of(model) if isinstance(one, LayerGates) and one.tally is not None]
    shares = [float(one.left.detach() / one.pairs.clamp(min=1)) for one in found]
    return sum(shares) / len(shares) if shares else None


register(
    PatchKind(
        PATCH,
        params=frozenset({"rank", "layers"}),
        apply_=_apply_,
        undo_=release_,
        tensors=frozenset({QUERIES, INTERACTION_KEYS, OFFSETS}),
    )
)
