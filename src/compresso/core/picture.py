"""A picture as an example: its bytes of colour, and how a model wants to see them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def that_sees(config: Any) -> Any:
    """The config that says which pictures a model sees: a model's own, or its backbone's where that has the size."""
    return config if hasattr(config, "image_size") else getattr(config, "backbone_config", None) or config


@dataclass(frozen=True)
class PixelInput:
    """What a model makes of colours from 0 to 255 before it reads them: scaled, shifted, in its order of channels.

    Args:
        height, width: that pictures are brought to.
        mean, std: by channel, of colours from 0 to 1; (0,) and (1,) leave them there.
        bgr: whether blue comes first.
        reduced: whether 0 in a label map is no class, and each other number the class before it (ADE20K's maps).
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    bgr: bool = False
    reduced: bool = False

    @cached_property
    def _shift(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).reshape(-1, 1, 1), torch.tensor(self.std).reshape(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [..., channels, height, width], red first -> float32 of the same shape."""
        mean, std = self._shift
        scaled = (pixels.float() / 255 - mean) / std
        return scaled.flip(-3) if self.bgr else scaled


@dataclass(frozen=True)
class Picture:
    """A picture in a model's size.

    Args:
        pixels: uint8 [3, height, width], red first.
        inputs: how the model sees it.
        classes: of each pixel [height, width], uint8, 255 for one that is passed over; None where the picture has one
            label in all.
    """

    pixels: Tensor
    inputs: PixelInput
    classes: Tensor | None = None
