"""At how many places of a picture a convolution writes, from the size of what it reads."""

from torch import nn


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
