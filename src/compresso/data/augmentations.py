"""Pictures drawn anew for each pass over the data, with their label maps: our own, in torch, because torchvision does
not import beside the pinned torch.

One affine map says where each pixel of the result is read (`grid_sample`): turned, scaled, cut, mirrored at once, so
that a picture is sampled once. Colours are read bilinearly and mirrored beyond the edge; classes are those of the
nearest pixel, and IGNORED beyond it. Brightness, contrast and saturation are each multiplied by a factor drawn from
1 - jitter to 1 + jitter, as in the usual colour jitter; hue is left alone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.picture import Picture

IGNORED = 255
"""The class of a pixel that is passed over."""
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a picture.

    Args:
        flip: the chance of a mirror image, left to right.
        shift: the largest move in each direction, as a share of the side.
        scale: least and most that a picture is enlarged by.
        rotate: the largest angle to either side, in degrees.
        jitter: of colours.
    """

    flip: float = 0.5
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: float = 0.0
    jitter: float = 0.0


def augmented(picture: Picture, how: Augmentation, seed: int) -> Picture:
    """A picture as one pass sees it, with its label map; a function of the picture and the seed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    flipped = drawn(0, 1) < how.flip
    scale = math.exp(drawn(math.log(how.scale[0]), math.log(how.scale[1])))
    angle = math.radians(drawn(-how.rotate, how.rotate))
    room = how.shift + max(0.0, 1 - 1 / scale)  # a larger picture is cut anywhere
    x, y = drawn(-room, room), drawn(-room, room)
    factors = [drawn(1 - how.jitter, 1 + how.jitter) for _ in range(3)]
    pixels, classes = picture.pixels, picture.classes
    if (scale, angle, x, y) != (1.0, 0.0, 0.0, 0.0):
        grid = _grid(pixels.shape[-2], pixels.shape[-1], scale, angle, x, y)
        sampled = functional.grid_sample(pixels[None].float(), grid, padding_mode="reflection", align_corners=False)
        pixels = sampled[0].round().clamp(0, 255).to(torch.uint8)
        if classes is not None:
            known = classes[None, None].float() + 1  # beyond the edge lies 0
            found = functional.grid_sample(known, grid, mode="nearest", align_corners=False)[0, 0]
            classes = torch.where(found == 0, IGNORED + 1, found).sub(1).to(torch.uint8)
    if flipped:
        pixels, classes = pixels.flip(-1), None if classes is None else classes.flip(-1)
    if how.jitter:
        pixels = _jittered(pixels, *factors)
    return replace(picture, pixels=pixels, classes=classes)


def _grid(height: int, width: int, scale: float, angle: float, x: float, y: float) -> Tensor:
    """Where each pixel of the result is read [1, height, width, 2]; angles are of pixels, not of the unit square."""
    turned = math.cos(angle) / scale, math.sin(angle) / scale
    across = [[turned[0], -turned[1] * height / width, x], [turned[1] * width / height, turned[0], y]]
    return functional.affine_grid(torch.tensor([across]), [1, 1, height, width], align_corners=False)


def _jittered(pixels: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Colours [3, height, width] with these factors, one after the other."""
    grey = torch.tensor(_GREY).reshape(3, 1, 1)
    shown = (pixels.float() * brightness).clamp(0, 255)
    mean = (shown * grey).sum(0).mean()
    shown = (mean + contrast * (shown - mean)).clamp(0, 255)
    lightness = (shown * grey).sum(0, keepdim=True)
    return (lightness + saturation * (shown - lightness)).round().clamp(0, 255).to(torch.uint8)
