"""Layers that are skipped while a prompt is read, and run for every token after it (ShortGPT-gen, arXiv 2403.03853, ACL
version).

A forward patch: weights, shapes and files are those of the dense model, and so do decoding and the cache. Where a
chunk of more than one token comes, a skipped layer hands the stream on as it is and only fills its slot of the cache:
keys and values of its normed input, with the keys rotated as its own attention would. (The public code caches them
without rotation.) A later single token finds the slot it expects. Without a cache, as in training and in scoring, a
skipped layer does nothing at all.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

PATCH = "skip_in_prefill"


def prefill_patch(layers: Sequence[int]) -> Patch:
    """The patch that skips these layers.

    >>> prefill_patch([5, 2]).params
    {'layers': [2, 5]}
    """
    return Patch(PATCH, {"layers": sorted(layers)})


def skip_in_prefill_(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Skip these layers in every chunk of more than one token, in place.

    Raises:
        ArchError: a layer that is not there, or whose attention is not made of q_proj, k_proj and v_proj behind one
            norm.
    """
    blocks = arch_for(model.config).blocks(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ArchError(f"layer {layer} cannot be skipped: the model has layers 0 to {len(blocks) - 1}")
        block = blocks[layer]
        attention = getattr(block, "self_attn", None)
        if not all(hasattr(attention, part) for part in ("k_proj", "v_proj", "head_dim")) or not hasattr(
            block, "input_layernorm"
        ):
            raise ArchError(
                f"layer {layer} of {model.config.model_type} cannot be skipped in prefill; Llama-like attention is"
                " wanted"
            )
        block.forward = _skipping(block, block.forward)


def run_every_layer_(model: PreTrainedModel) -> None:
    """Undo `skip_in_prefill_`."""
    for block in arch_for(model.config).blocks(model):
        vars(block).pop("forward", None)


def _skipping(block: nn.Module, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's forward that reads prompts past it."""

    def forward(
        hidden_states: Tensor,
        *positional: Any,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """hidden_states [batch, seq, hidden], and whatever the model hands its layers."""
        given = {**options, "past_key_values": past_key_values, "position_embeddings": position_embeddings}
        if hidden_states.shape[1] == 1:
            return run(hidden_states, *positional, **given)
        if past_key_values is not None:
            assert position_embeddings is not None
            _fill_(block, hidden_states, past_key_values, position_embeddings)
        return hidden_states

    return forward


def _fill_(block: Any, hidden_states: Tensor, cache: Any, rotation: tuple[Tensor, Tensor]) -> None:
    """Put a chunk's rotated keys and its values into the layer's slot of the cache."""
    attention = block.self_attn
    read = block.input_layernorm(hidden_states)
    shape = (*read.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(read).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), attention.v_proj(read).view(shape).transpose(1, 2)
    rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]  # the family's own
    _, keys = rotate(keys, keys, *rotation)
    cache.update(keys, values, attention.layer_idx)


def _read(words: Sequence[str]) -> Patch | None:
    return prefill_patch([int(word) for word in words]) if all(word.isdigit() for word in words) else None


register(
    PatchKind(
        PATCH,
        params=frozenset({"layers"}),
        apply_=lambda model, patch: skip_in_prefill_(model, patch.params["layers"]),
        undo_=run_every_layer_,
        line=lambda patch: " ".join([PATCH, *map(str, patch.params["layers"])]),
        read=_read,
    )
)
