"""Which tokens of a cache stay by a rule that needs no training: scores of cached tokens, and a budget of them.

Shapes: keys [batch, heads, slots, width], and for each slot [batch, groups, slots] whether it is live and which place
of the sequence it holds; a group's tokens leave together. The higher score stays.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize


def norm_scores(keys: Tensor) -> Tensor:
    """Minus the norm of each key [batch, heads, slots]: keys of low norm draw attention (Knorm, arXiv 2406.11430)."""
    return -keys.float().square().sum(-1).sqrt()


def difference_scores(keys: Tensor, live: Tensor) -> Tensor:
    """Minus the cosine of each key to the mean of all live normed keys [batch, heads, slots]: keys unlike the others
    stay (KeyDiff, arXiv 2504.15364).

    live: [batch, heads, slots].
    """
    units = normalize(keys.float(), dim=-1) * live.unsqueeze(-1)
    mean = units.sum(2, keepdim=True) / live.sum(-1).clamp(min=1).view(*live.shape[:2], 1, 1)
    return -torch.nn.functional.cosine_similarity(keys.float(), mean, dim=-1)


def recency_scores(places: Tensor, sinks: Tensor, first: Tensor) -> Tensor:
    """The place of each token, the first few of a sample above all others (StreamingLLM, arXiv 2309.17453).

    sinks, first: of each sample, how many those are and the place of its first token that is no padding [batch].
    """
    is_sink = places < (first + sinks).view(-1, 1, 1)
    return places.float() + is_sink * float(torch.iinfo(torch.int32).max)


def pooled(scores: Tensor, kernel: int) -> Tensor:
    """Scores [batch, groups, slots] smoothed over neighbours, ends over what there is."""
    return avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=False)


def best(scores: Tensor, live: Tensor, budget: Tensor) -> Tensor:
    """The live tokens of the highest scores [batch, groups, slots], bool, of each sample as many as its budget.

    budget: [batch], int64. Of equal scores the first slot stays.

    >>> best(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[True, True, True]]]), torch.tensor([2]))
    tensor([[[False,  True,  True]]])
    """
    order = scores.masked_fill(~live, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(dim=-1)
    return live & (ranks < budget.view(-1, 1, 1))
