"""Devices that a plan can be made for though they are not here.

Rates are those of dense products in bfloat16 (float16 where there is none), as their makers' data sheets give them;
plans assume that passes reach a part of them.
"""

import re
from dataclasses import dataclass

import torch

from compresso.errors import ResourceError, nearest
from compresso.training.device import choose_device

REACHED = 0.4
"""Share of a data sheet's rate that passes over a model are taken to reach."""


@dataclass(frozen=True)
class Known:
    """A device by its data sheet.

    Args:
        flops: a second, of dense 16-bit products.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
    """

    flops: float
    memory: float
    bandwidth: float


DEVICES = {
    "a100-40gb": Known(312e12, 40e9, 1555e9),
    "a100-80gb": Known(312e12, 80e9, 2039e9),
    "a10g": Known(70e12, 24e9, 600e9),
    "h100": Known(989e12, 80e9, 3350e9),
    "h200": Known(989e12, 141e9, 4800e9),
    "l4": Known(121e12, 24e9, 300e9),
    "l40s": Known(362e12, 48e9, 864e9),
    "rtx4090": Known(165e12, 24e9, 1008e9),
    "t4": Known(65e12, 16e9, 320e9),
}


@dataclass(frozen=True)
class Planned:
    """What a plan is made for.

    Args:
        name: as a person gave it.
        here: the device, if it is in this machine.
        known: its data sheet, if it is not.
        count: how many of them, with a process each.
    """

    name: str
    here: torch.device | None = None
    known: Known | None = None
    count: int = 1

    @property
    def computes_in(self) -> torch.dtype:
        """float32 on a CPU, 16 bits elsewhere."""
        return torch.float32 if self.here is not None and self.here.type == "cpu" else torch.bfloat16


def planned(name: str) -> Planned:
    """A device of this machine ("auto", "cpu", "cuda", "cuda:1"), one of `DEVICES`, or several of these ("8xh100").

    Raises ResourceError for any other, with the nearest.
    """
    if several := re.fullmatch(r"([1-9]\d{0,3})x(\w.*)", name.lower()):
        count, one = int(several[1]), several[2]
        if one not in DEVICES:
            raise ResourceError(f"--device {name}: '{one}' has no data sheet here; {nearest(one, DEVICES)}")
        return Planned(name.lower(), known=DEVICES[one], count=count)
    if name.lower() in DEVICES:
        return Planned(name.lower(), known=DEVICES[name.lower()])
    if name.lower() == "auto" or name.lower().split(":")[0] in ("cpu", "cuda", "mps"):
        device = choose_device(name.lower())
        return Planned(device.type, here=device)
    shown = name or "''"
    raise ResourceError(f"--device {shown} is unknown; {nearest(name.lower(), DEVICES)}")
