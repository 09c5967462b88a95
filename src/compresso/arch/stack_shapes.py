"""The widths of a stack's layers, read off their linears."""

from torch import nn

from compresso.arch.absent import is_absent
from compresso.arch.base import LayerShape
from compresso.arch.parts import Parts
from compresso.core.axis import Kind
from compresso.errors import ArchError


def lacks(block: nn.Module, parts: Parts, kind: Kind) -> bool:
    """Whether a layer's attention or mlp is gone."""
    return is_absent(block.get_submodule(parts.core if kind == Kind.ATTENTION else parts.ffn or parts.down))


def shapes_of(blocks: nn.ModuleList, where: str, parts: Parts, name: str) -> list[LayerShape]:
    """The widths of each layer.

    Args:
        blocks, where: the layers, and the qualified name of their list.
        parts: the names of a layer's parts.
        name: of the model's family.

    Raises:
        ArchError: a module or a width is not the stock layer's.
    """
    norms = (*parts.head_norms, *parts.attention_norms, *parts.ffn_norms, *parts.shared_norms, *parts.sum_norms)
    known = (*parts.read, parts.write, *parts.up, parts.down, *norms)
    shapes: list[LayerShape] = []
    for i, block in enumerate(blocks):
        for parameter, _ in block.named_parameters():
            if parameter.rpartition(".")[0] not in known:
                raise ArchError(
                    f"parameter '{where}.{i}.{parameter}' is not part of a plain {name}; merge adapters, pass the"
                    " stock model"
                )
        query_heads = kv_heads = channels = 0
        if not lacks(block, parts, Kind.ATTENTION):
            head_dim = int(getattr(block.get_submodule(parts.core), parts.head_dim, 0))
            widths = parts.head_widths(block, f"{where}.{i}")
            heads = [0 if not head_dim or width % head_dim else width // head_dim for width in widths]
            query_heads, kv_heads = heads[0], heads[1]
            if not kv_heads or heads != [query_heads, kv_heads, kv_heads, query_heads] or query_heads % kv_heads:
                raise ArchError(
                    f"{where}.{i}.{parts.attention} has {heads} heads in q, k, v and o; wanted as many in q and o,"
                    " and in k and v"
                )
        if not lacks(block, parts, Kind.MLP):
            *ups, channels = parts.ffn_widths(block, f"{where}.{i}")
            if any(up != channels for up in ups):
                raise ArchError(f"{where}.{i}.{parts.down} reads {channels} channels, {ups} are written")
        shapes.append(LayerShape(query_heads, kv_heads, channels))
    return shapes
