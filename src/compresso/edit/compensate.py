"""Puts what removed inputs gave on average into the bias of the linear that read them (the outer part of OBS for a
constant input).
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def compensate_(linear: nn.Module, mean: Tensor, removed: Tensor) -> bool:
    """b += W m, where m is the mean input at the removed entries and 0 elsewhere; whether the linear has a bias to
    take it.

    Args:
        linear: changed in place; whatever its weight's orientation.
        mean: [in], mean of its input.
        removed: [in], bool.
    """
    bias = getattr(linear, "bias", None)
    if bias is None:
        return False
    given = torch.where(removed.to(mean.device), mean, 0.0).to(bias.device, bias.dtype).unsqueeze(0)
    bias += (linear(given) - linear(torch.zeros_like(given))).squeeze(0)
    return True
