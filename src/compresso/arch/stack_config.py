"""Config and shape fields of a stack's modules, set to what the parameters are.

`num_attention_heads` becomes the largest count of a layer. Where the config has no head_dim, a stock class built from
it would give heads another width; the exporter refuses such a model. Phi and Phi-3 have no such field but obey it, so
they are given one.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.arch.decoder_shape import cache_slots
from compresso.arch.layer_config import config_of_layer, tell_head_dim_
from compresso.arch.parts import Parts


def sync_config_(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    parts: Parts,
    shapes: Sequence[LayerShape],
    final_norm: str | None,
    *,
    reads_hidden: bool,
    obeys_head_dim: bool,
) -> None:
    """Set what config and attentions say of widths, and give each attention its cache slot.

    Args:
        model: changed in place.
        blocks, parts, shapes: its layers.
        final_norm: the norm that the head reads, whose width is that of the stream; None where no dimension can leave.
        reads_hidden: whether the embedding's width is that of the stream.
        obeys_head_dim: whether the config, which has no width of heads, obeys one.
    """
    config = model.config
    config.num_hidden_layers = len(blocks)
    if final_norm is not None:
        norm = model.get_submodule(final_norm)
        config.hidden_size, config.rms_norm_eps = len(norm.get_parameter("weight")), norm.variance_epsilon
    elif reads_hidden:
        config.hidden_size = model.get_input_embeddings().get_parameter("weight").shape[1]
    if any(shape.kv_heads for shape in shapes):
        config.num_attention_heads = max(shape.query_heads for shape in shapes)
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = max(shape.kv_heads for shape in shapes)
        if obeys_head_dim:
            core = next(b.get_submodule(parts.core) for b, s in zip(blocks, shapes, strict=True) if s.kv_heads)
            tell_head_dim_(config, int(getattr(core, parts.head_dim)))
    if parts.channels and any(shape.channels for shape in shapes):
        setattr(config, parts.channels, max(shape.channels for shape in shapes))
    cores = [block.get_submodule(parts.core) for block in blocks]
    kinds = [
        getattr(core, "layer_type", None) or "" if shape.kv_heads else None
        for core, shape in zip(cores, shapes, strict=True)
    ]
    labels, slots = cache_slots(kinds)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [label or "full_attention" for label in labels]
    for block, core, shape, slot in zip(blocks, cores, shapes, slots, strict=True):
        if slot is not None and hasattr(core, "layer_idx"):
            core.layer_idx = slot  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        if shape.kv_heads:
            _sync_attention_(config, core, parts, shape)
        if parts.ffn and parts.channels and shape.channels:
            mlp = block.get_submodule(parts.ffn)
            if hasattr(mlp, parts.channels):
                setattr(mlp, parts.channels, shape.channels)


def _sync_attention_(config: PreTrainedConfig, core: nn.Module, parts: Parts, shape: LayerShape) -> None:
    """What an attention says of its heads."""
    width = int(getattr(core, parts.head_dim))
    fields: dict[str, object] = dict.fromkeys(parts.heads, shape.query_heads)
    fields |= dict.fromkeys(parts.kv_heads, shape.kv_heads)
    fields |= dict.fromkeys(parts.widths, shape.query_heads * width)
    if hasattr(core, "num_key_value_groups"):
        fields["num_key_value_groups"] = shape.query_heads // shape.kv_heads
    if parts.heads_in_config:
        fields["config"] = config_of_layer(config, shape.query_heads, width)
    for field, value in fields.items():
        setattr(core, field, value)
