"""Averaging experts of a stack into one of them, its channels aligned first (M-SMoE, arXiv 2310.01334, section 3.1).

Channels of an expert have no order: those of a member are put beside the channels of the one that stays by the
assignment whose products of weights are largest in sum. It takes the cube of the width in the worst case.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

_MEASURED = 2048
"""Widest assignment that is tried to see how long one takes."""


@dataclass(frozen=True)
class Merging:
    """What aligning and averaging takes, whatever the data.

    Args:
        experts: that go into others, one after the other.
        width: channels of an expert.
        entries: numbers of each channel: what gate, up and down have of it.
    """

    experts: int
    width: int
    entries: int

    @property
    def flops(self) -> int:
        """Of the products of each expert's channels with those of the one that stays; the assignments come on top."""
        return 2 * self.experts * self.width**2 * self.entries

    @property
    def held(self) -> int:
        """Bytes beside the weights, where they lie: the mean in float64, two experts and their products in float32."""
        return 16 * self.width * self.entries + 4 * self.width**2

    @property
    def assigned(self) -> int:
        """Bytes of an assignment in the memory of the host: the products twice in float64."""
        return 16 * self.width**2

    def seconds_of_assignments(self) -> float:
        """What the assignments take on one core of this machine: one is measured, of random channels and at most
        2,048 of them, and wider ones are counted as if time grew with the cube, which is the worst case.
        """
        size = min(self.width, _MEASURED)
        generator = torch.Generator().manual_seed(0)
        one, other = (torch.randn(size, size, generator=generator) for _ in range(2))
        products = (one @ other.T).numpy()
        begun = time.process_time()
        linear_sum_assignment(products, maximize=True)
        return self.experts * (time.process_time() - begun) * (self.width / size) ** 3


def channels_of(experts: nn.Module, expert: int) -> list[Tensor]:
    """An expert's tensors as views whose first dimension is its channels [width, ...]: gate, up, down, then biases."""
    live: Any = experts
    turned = bool(getattr(experts, "is_transposed", False))
    first = live.gate_up_proj.data[expert].T if turned else live.gate_up_proj.data[expert]
    down = live.down_proj.data[expert] if turned else live.down_proj.data[expert].T
    bias = getattr(live, "gate_up_proj_bias", None)
    pairs = [first] if bias is None else [first, bias.data[expert]]
    split = [[one[::2], one[1::2]] if turned else list(one.chunk(2)) for one in pairs]
    return [*split[0], down, *(split[1] if bias is not None else [])]


def aligned(kept: Sequence[Tensor], member: Sequence[Tensor]) -> Tensor:
    """Which channel of a member goes to each of the expert that stays [width]; both as `channels_of` has them."""
    one, other = (torch.cat([part.float().reshape(len(part), -1) for part in of], dim=1) for of in (kept, member))
    _, columns = linear_sum_assignment((one @ other.T).cpu().numpy(), maximize=True)
    return torch.as_tensor(columns)


@torch.no_grad()
def merge_(experts: nn.Module, members: Sequence[int], shares: Tensor) -> None:
    """Write the weighted mean of some experts into the first of them.

    Args:
        experts: holds the stacks.
        members: numbers.
        shares: of each, adding up to 1 [members].
    """
    kept = channels_of(experts, members[0])
    total = [float(shares[0]) * part.double() for part in kept]
    for expert, share in zip(members[1:], shares[1:].tolist(), strict=True):
        parts = channels_of(experts, expert)
        order = aligned(kept, parts).to(parts[0].device)
        total = [whole + share * part[order].double() for whole, part in zip(total, parts, strict=True)]
    for part, whole in zip(kept, total, strict=True):
        part.copy_(whole)
    bias: Any = getattr(experts, "down_proj_bias", None)
    if bias is not None:
        mean = (shares.to(bias.device)[:, None] * bias[list(members)].double()).sum(0)
        bias[members[0]] = mean.to(bias.dtype)
