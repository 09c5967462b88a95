"""Attention over a context from which tokens are dropped, put on a model and taken off it again.

It goes through transformers' own interface of attention functions, under a name of ours: the model makes its mask over
all places, a hook shows the keeper of a layer what its attention reads, and the function adds what the keeper dropped
to the mask. The product itself is transformers' SDPA with an additive mask; kernels that take none (flash) are not used
while it is on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compresso.arch.base import arch_for
from compresso.edit.context_cache import LIVE, ContextCache, ContextLayer, at_places, tokens
from compresso.errors import ArchError

NAME = "compresso_context"
"""Of the attention function, in `config._attn_implementation`."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
_HELD, _BASE = "_compresso_context", "_compresso_context_base"
_PARTS = ("self_attn", "attn", "attention")


@dataclass
class Seen:
    """One call of a layer's attention.

    Args:
        query: [batch, query heads, tokens, width].
        chunk: keys and values [batch, heads, tokens, width] of the tokens that came.
        visible: [batch, 1, tokens, places], bool: all that a query sees, where it is no padding; and its own key.
        real: [batch, tokens], bool.
        layer: of the cache; None without one.
        attend: additive mask or None, keys, values -> output [batch, tokens, query heads, width].
        scaling: of scores.
    """

    query: Tensor
    chunk: dict[str, Tensor]
    visible: Tensor
    real: Tensor
    layer: ContextLayer | None
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    scaling: float


class Keeper(Protocol):
    """What decides in one layer which tokens stay."""

    def read(self, given: Tensor) -> None:
        """Look at what the attention reads [batch, tokens, hidden]."""
        ...

    def attend(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Attend to what is there, drop what leaves, and store the rest in the layer of the cache."""
        ...


@dataclass
class _Held:
    """A keeper on its attention module, and the cache of the running call."""

    keeper: Keeper
    hook: Any
    layer: ContextLayer | None = None


def hold_(model: PreTrainedModel, keepers: Mapping[int, Keeper] | Callable[[int], Keeper]) -> None:
    """Let keepers decide what each layer's context is, in place; those of before come off.

    keepers: of each layer, by its number.

    Raises:
        ArchError: attention of this family, or with a window, is not patched.
    """
    refuse_foreign(model)
    release_(model)
    attentions = attentions_of(model)
    for i, attention in enumerate(attentions):
        keeper = keepers[i] if isinstance(keepers, Mapping) else keepers(i)
        held = _Held(keeper, None)
        held.hook = attention.register_forward_pre_hook(_reading(held), with_kwargs=True)
        vars(attention)[_HELD] = held
    base = model.base_model
    before = {id(config): (config, _named(config)) for config in _configs(model)}
    vars(base)[_BASE] = (base.register_forward_pre_hook(_with_cache(len(attentions)), with_kwargs=True), before)
    for config, _ in before.values():
        config._attn_implementation = NAME


def release_(model: PreTrainedModel) -> None:
    """Undo `hold_`; does nothing where nothing is held."""
    for module in model.modules():
        if (held := vars(module).pop(_HELD, None)) is not None:
            held.hook.remove()
        if (found := vars(module).pop(_BASE, None)) is not None:
            hook, before = found
            hook.remove()
            for config, implementation in before.values():
                config._attn_implementation = implementation


def refuse_foreign(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Raise ArchError for a model, or the config of one, whose attention is not patched."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    if config.model_type not in FAMILIES:
        raise ArchError(
            f"the context of a {config.model_type} cannot be pruned; wanted one of {', '.join(FAMILIES)} (or a shrunk"
            " one of these)"
        )
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = int(getattr(config, "max_position_embeddings", 0) or 0)
    if types - {"full_attention", "sliding_attention"} or (window is not None and window < longest):
        raise ArchError(
            f"the config has a sliding window ({window} of {longest} positions), whose cache forgets by itself; set"
            " sliding_window to null in config.json, or take a model without one"
        )


def attentions_of(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer. Raises ArchError for a layer without."""
    found: list[nn.Module] = []
    for i, block in enumerate(arch_for(model.config).blocks(model)):
        module = next((getattr(block, part) for part in _PARTS if hasattr(block, part)), None)
        if module is None or not hasattr(module, "layer_idx"):
            raise ArchError(
                f"layer {i} has no attention whose context could be pruned; keep the attention of all layers"
            )
        found.append(module)
    return found


def keepers_of(model: nn.Module) -> list[Keeper]:
    """The keepers on a model, in the order of its layers; none where nothing is held."""
    return [vars(module)[_HELD].keeper for module in model.modules() if _HELD in vars(module)]


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config in a model: layers of some families have one of their own."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(one): one for one in found if isinstance(one, PreTrainedConfig)}.values())


def _named(config: PreTrainedConfig) -> str | None:
    """The attention function to go back to; another model may have the same config and be held."""
    return "sdpa" if config._attn_implementation == NAME else config._attn_implementation


def _with_cache(n_layers: int) -> Callable[..., Any]:
    """A hook before the decoder: a cache that it would make, or that is empty, becomes one of ours."""

    def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = named.get("past_key_values")
        asked = named.get("use_cache")
        uses = bool(module.config.use_cache if asked is None else asked)
        if isinstance(cache, ContextCache):
            return arguments, named
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise ArchError(
                f"past_key_values is a {type(cache).__name__} that cannot hold a pruned context; leave it and"
                " cache_implementation out, or give a ContextCache"
            )
        if module.training or (cache is None and not uses):
            return arguments, named
        return arguments, {**named, "past_key_values": ContextCache(n_layers), "use_cache": True}

    return hook


def _reading(held: _Held) -> Callable[..., None]:
    """A hook before an attention: its keeper reads what it reads."""

    def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.config._attn_implementation != NAME:
            raise ArchError(
                f"attention was switched to {module.config._attn_implementation}, which drops nothing of the context;"
                " put this stage behind those that need the probabilities of attention"
            )
        given = arguments[0] if arguments else named["hidden_states"]
        held.keeper.read(given)
        cache = next((one for one in (*arguments, *named.values()) if isinstance(one, Cache)), None)
        held.layer = cache.layers[module.layer_idx] if isinstance(cache, ContextCache) else None
        if held.layer is not None:
            held.layer.expect()

    return hook


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that `NAME` is: what the keeper of the module makes of the call; plain SDPA in a model
    without keepers that shares its config with one that has some.
    """
    held: _Held | None = vars(module).get(_HELD)
    if held is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=False)
    if attention_mask is None or attention_mask.dtype != torch.bool:
        raise ArchError(
            "a pruned context wants an attention mask [batch, tokens] of 0 and 1, or a bool one of four dimensions"
        )
    batch, n = query.shape[0], query.shape[2]
    visible = attention_mask.expand(batch, 1, n, -1)
    start = visible.shape[-1] - n
    real = visible[:, 0, :, start:].diagonal(dim1=-2, dim2=-1)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5

    def attend(mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        if n == 1 and not dropout:
            return _single(query, keys, values, mask, scale), None
        if mask.shape[1] > 1:  # groups of key/value heads
            mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
        least = max(torch.finfo(query.dtype).min, torch.finfo(mask.dtype).min)
        low = mask.clamp(min=least).to(query.dtype)
        asked = query
        if query.is_cuda and low.requires_grad and not (query.requires_grad or keys.requires_grad):
            asked = query.detach().requires_grad_()  # else the fused kernel keeps nothing for a backward of the mask
        return sdpa_attention_forward(module, asked, keys, values, low, dropout=dropout, scaling=scale, is_causal=False)

    seen = Seen(
        query,
        {"keys": key, "values": value},
        visible & real.unsqueeze(1).unsqueeze(-1),
        real,
        held.layer,
        attend,
        scale,
    )
    return held.keeper.attend(seen)


def _single(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token [batch, 1, query heads, width], the query heads of a group being so many queries of its
    key/value head: keys and values, of which there are many, are not written out once for each of them.

    mask: additive [batch, 1 or key/value heads, 1, slots].
    """
    batch, n_heads, _, width = query.shape
    folded = query.view(batch, keys.shape[1], -1, width)
    low = mask.clamp(min=max(torch.finfo(query.dtype).min, torch.finfo(mask.dtype).min)).to(query.dtype)
    low = low.expand(batch, keys.shape[1], folded.shape[2], -1)
    found = scaled_dot_product_attention(folded, keys, values, attn_mask=low, scale=scale)
    return found.reshape(batch, n_heads, 1, -1).transpose(1, 2).contiguous()


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask that models make for `NAME`: always there, bool."""
    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def additive(allowed: Tensor, own: Tensor) -> Tensor:
    """0 where a query may attend or finds itself, the lowest number elsewhere, float32."""
    low = torch.finfo(torch.float32).min
    return torch.full(allowed.shape, low, device=allowed.device).masked_fill(allowed | own, 0.0)


@dataclass(frozen=True)
class Context:
    """What a call finds in the cache.

    Args:
        slots: with the chunk that came, in any order.
        visible: [batch, groups, queries, slots], bool.
        own: where each query's own token lies [..., queries, slots], bool.
    """

    slots: dict[str, Tensor]
    visible: Tensor
    own: Tensor


def context_of(seen: Seen, chunk: Mapping[str, Tensor], groups: int) -> Context:
    """The slots of the cache with a chunk behind them, and what its queries see.

    chunk: keys, values and what else is remembered of each token.
    """
    assert seen.layer is not None
    n = seen.query.shape[2]
    places = torch.arange(seen.layer.seen, seen.layer.seen + n, device=seen.query.device)
    slots = seen.layer.with_chunk(tokens(chunk, places, seen.real, groups))
    visible = at_places(seen.visible, slots["places"]) & slots[LIVE].unsqueeze(2)
    own = torch.zeros(n, slots[LIVE].shape[-1], dtype=torch.bool, device=seen.query.device)
    own[:, -n:].fill_diagonal_(True)
    return Context(slots, visible, own)
