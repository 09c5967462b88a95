"""Small procedural scenes: sky above, ground below, and a square, a disc or a cross somewhere, drawn by a seed; with
the class of each pixel, and the kind of thing as the label of the whole.
"""

from typing import Any

import torch
from torch import Tensor

SIDE = 32
NARROW: dict[str, Any] = {
    "image_size": SIDE,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
    "num_attention_heads": 2,
    "aspp_out_channels": 16,
    "output_stride": 8,
}
"""Sizes of a MobileViT that is made in no time."""
THINGS = ("square", "disc", "cross")
CLASSES = ("sky", "ground", *THINGS)
_COLOURS = torch.tensor([[90, 140, 220], [70, 120, 60], [210, 60, 50], [230, 200, 60], [240, 240, 240]])


def scene(seed: int, side: int = 16) -> tuple[Tensor, Tensor, int]:
    """Pixels uint8 [3, side, side], classes uint8 [side, side], and the number of the thing."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (), generator=draw))  # noqa: E731
    classes = torch.zeros(side, side, dtype=torch.long)
    classes[pick(side // 3, 2 * side // 3) :] = 1
    kind, size = seed % len(THINGS), pick(side // 4, side // 3 + 1)
    y, x = pick(size, side - size), pick(size, side - size)
    rows, columns = torch.meshgrid(torch.arange(side) - y, torch.arange(side) - x, indexing="ij")
    near = (rows.abs() < size) & (columns.abs() < size)
    inside = (near, rows**2 + columns**2 < size**2, near & ((rows.abs() < 2) | (columns.abs() < 2)))[kind]
    classes[inside] = 2 + kind
    noise = torch.randint(-20, 21, (3, side, side), generator=draw)
    pixels = (_COLOURS[classes].permute(2, 0, 1) + noise).clamp(0, 255).to(torch.uint8)
    return pixels, classes.to(torch.uint8), kind
