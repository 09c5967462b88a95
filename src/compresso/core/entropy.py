"""How informative the values of a channel are: the entropy of their histogram (E-Sparse, arXiv 2310.15929, section
3.2).

The range of a channel is that of the first tokens seen; later values beyond it count in the outermost bins, so that one
pass is enough.
"""

import torch
from torch import Tensor

BINS = 100


def histograms(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Fold: rows of counts [BINS], least value, greatest value, and sum of squares, of each channel: [BINS + 3, in],
    float64.

    inputs: [tokens, in]; the first that come say the range.
    """
    size = inputs.shape[1]
    if total is None:
        total = torch.zeros(BINS + 3, size, dtype=torch.float64, device=inputs.device)
        total[BINS], total[BINS + 1] = inputs.amin(dim=0), inputs.amax(dim=0)
    low, high = total[BINS].to(inputs), total[BINS + 1].to(inputs)
    share = (inputs - low) / torch.where(high > low, high - low, 1)
    places = (share * BINS).long().clamp(0, BINS - 1)
    total[:BINS].scatter_add_(0, places, torch.ones_like(places, dtype=total.dtype))
    total[BINS + 2] += inputs.square().sum(dim=0)
    return total


def entropy(counts: Tensor) -> Tensor:
    """-sum p ln p of each column of counts [bins, channels], in nats [channels]; between 0 and ln(bins).

    >>> round(float(entropy(torch.tensor([[1.0], [1.0], [2.0], [4.0]]))), 6)
    1.213008
    """
    p = counts / counts.sum(dim=0)
    return -torch.where(p > 0, p * p.clamp(min=torch.finfo(p.dtype).tiny).log(), 0).sum(dim=0)
