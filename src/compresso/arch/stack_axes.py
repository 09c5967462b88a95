"""The axes of one layer of a stack: its heads, and the units of its FFN."""

from transformers import PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.arch.parts import Parts, output_dim, tensors, written
from compresso.core.axis import Axis, Gate, Kind, Slice


def heads_axis(
    model: PreTrainedModel, where: str, layer: int, shape: LayerShape, parts: Parts, *, norms_first: bool
) -> Axis:
    """One key/value head with its query heads: rows of q, k, v and columns of o.

    Args:
        model: whose list of layers lies at `where`.
        where, layer: of the layer.
        shape: its widths.
        parts: the names of its parts.
        norms_first: whether its norms lie before the sub-layers and leave with them.
    """
    block = f"{where}.{layer}"
    head_dim = int(getattr(model.get_submodule(f"{block}.{parts.core}"), parts.head_dim))
    group = head_dim * (shape.query_heads // shape.kv_heads)
    slices = written(model, block, parts.head_runs(shape.kv_heads, group, head_dim))
    leaving = (*parts.attention_norms, *parts.head_norms) if norms_first else ()
    reads, container = (f"{block}.{parts.write}", group), f"{block}.{parts.attention}"
    return _axis(model, Kind.HEAD, shape.kv_heads, block, layer, slices, reads, container, leaving)


def channels_axis(
    model: PreTrainedModel, where: str, layer: int, shape: LayerShape, parts: Parts, *, norms_first: bool
) -> Axis:
    """One FFN unit: a row of what reads the stream and a column of down; arguments as `heads_axis`."""
    block = f"{where}.{layer}"
    slices = written(model, block, parts.channel_runs(shape.channels))
    leaving = parts.ffn_norms if norms_first else ()
    reads, container = (f"{block}.{parts.down}", 1), f"{block}.{parts.ffn}" if parts.ffn else block
    return _axis(model, Kind.CHANNEL, shape.channels, block, layer, slices, reads, container, leaving)


def _axis(
    model: PreTrainedModel,
    kind: Kind,
    size: int,
    block: str,
    layer: int,
    slices: tuple[Slice, ...],
    reads: tuple[str, int],
    container: str,
    leaving: tuple[str, ...],
) -> Axis:
    """An axis of one layer.

    Args:
        slices: those that write the units.
        reads: the linear that reads them, and the width that it reads of each.
        container: what they lie in.
        leaving: norms of the layer that leave with the last unit, where nothing outlives it.
    """
    reader, width = reads
    biased = f"{reader}.bias" in dict(model.get_submodule(reader).named_parameters(prefix=reader))
    there = dict(model.get_submodule(block).named_modules())
    return Axis(
        name=f"layers.{layer}.{'heads' if kind == Kind.HEAD else 'channels'}",
        kind=kind,
        size=size,
        slices=(*slices, Slice(f"{reader}.weight", 1 - output_dim(model.get_submodule(reader)), width)),
        gates=(Gate(reader, "input", width),),
        container=container,
        layer=layer,
        with_last_unit=()
        if biased
        else tuple(p for norm in leaving if norm in there for p in tensors(model, f"{block}.{norm}")),
        min_units=int(biased),
    )
