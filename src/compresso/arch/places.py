"""At how many places of a picture a convolution writes, from the size of what it reads, and what that makes of a
model's weights.
"""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from compresso.core.cost import Group, Weight


def behind(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a convolution writes.

    conv: with paddings that are numbers. size: height and width of what it reads.
    """
    sides: list[int] = []
    for dim, side in enumerate(size):
        reach, padding = conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1, conv.padding[dim]
        assert isinstance(padding, int)
        sides.append((side + 2 * padding - reach) // conv.stride[dim] + 1)
    return sides[0], sides[1]


def weights_at(model: PreTrainedModel, places: Mapping[str, int], inside: tuple[str, ...]) -> tuple[Weight, ...]:
    """Every parameter of a model of pictures, with the places at which it multiplies.

    Args:
        model: its batch and layer norms are counted apart.
        places: of every other module with a weight, how many places of a picture it writes.
        inside: beginnings of the names of what counts as blocks.
    """
    weights: list[Weight] = []
    for name, parameter in model.named_parameters():
        module, _, tensor = name.rpartition(".")
        if isinstance(model.get_submodule(module), nn.BatchNorm2d | nn.LayerNorm):
            weights.append(Weight(name, tuple(parameter.shape), Group.NORMS))
            continue
        group = Group.BLOCKS if name.startswith(inside) else Group.EMBEDDINGS
        macs = places[module] if tensor == "weight" else 0
        weights.append(Weight(name, tuple(parameter.shape), group, macs=macs))
    return tuple(weights)
