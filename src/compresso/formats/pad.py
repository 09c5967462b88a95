"""Zero padding that leaves the function unchanged: added heads and channels compute something that meets only zeros on
its way out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compresso.arch.base import LayerShape


def pad_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    shapes: tuple[LayerShape, ...],
    wide: LayerShape,
    head_dim: int,
) -> dict[str, Tensor]:
    """All expected tensors: those there are, padded to the wide layer; those of absent sub-layers zero, their norms
    one.

    Query heads stay with their key/value head: a layer's [kv, group] heads become the first entries of [wide kv, wide
    group].
    """
    like = tensors["model.embed_tokens.weight"]
    padded: dict[str, Tensor] = {}
    for name, size in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            fill = 1.0 if name.endswith("norm.weight") else 0.0
            padded[name] = torch.full(size, fill, dtype=like.dtype, device=like.device)
        elif tuple(tensor.shape) == size:
            padded[name] = tensor
        elif ".q_proj." in name or ".o_proj." in name:
            shape = shapes[int(name.split(".")[2])]
            padded[name] = _pad_heads(tensor, 1 if ".o_proj." in name else 0, shape, wide, head_dim)
        else:
            padded[name] = tensor.new_zeros(size)
            padded[name][tuple(slice(0, length) for length in tensor.shape)] = tensor
    return padded


def _pad_heads(tensor: Tensor, dim: int, shape: LayerShape, wide: LayerShape, head_dim: int) -> Tensor:
    """Pad query heads [kv * group * head_dim] along `dim`, group by group."""
    group, wide_group = shape.query_heads // shape.kv_heads, wide.query_heads // wide.kv_heads
    first = tensor.movedim(dim, 0)
    rest = first.shape[1:]
    result = tensor.new_zeros(wide.kv_heads, wide_group, head_dim, *rest)
    result[: shape.kv_heads, :group] = first.reshape(shape.kv_heads, group, head_dim, *rest)
    return result.reshape(wide.query_heads * head_dim, *rest).movedim(0, dim)
