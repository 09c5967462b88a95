"""Learned gates on the context of each layer (Dynamic Context Pruning, arXiv 2305.15805, section 3), as a forward patch
with tensors.

In each layer, interaction queries and keys of what its attention reads (no positions, no bias) score pairs of tokens;
where a score plus the layer's offset is not above 0, the later token drops the earlier one from this layer for good.
With a cache the dropped token's slot is given back; without one the whole table of gates is computed, with the same
result. One gate serves all heads of a layer, so that groups of key/value heads drop together.

What differs from the public code: queries at padding drop nothing, so that padding in the middle of a sequence leaves
no trace; chunks that follow a cache see its live tokens alone; one code serves rotary and learned positions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.edit.context_apart import Apart
from compresso.edit.context_attention import (
    attentions_of,
    hold_,
    keepers_of,
    refuse_foreign,
    release_,
)
from compresso.edit.context_layer_gates import INTERACTION_KEYS, LayerGates
from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

PATCH = "context_gates"
QUERIES, OFFSETS = "queries", "offsets"
FEW_HEADS = 4
"""With no more key/value heads than this, interaction keys would be a large part of the cache."""


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
        arch = arch_for(model.config)
        for one, attention, block in zip(self.gates, attentions_of(model), arch.blocks(model), strict=True):
            one.apart = Apart(arch, attention, block)
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
