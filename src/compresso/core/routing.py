"""How a router chooses among experts, as mathematics on its logits: what transformers' routers compute, with experts
left out.

    softmax     scores over all experts; the top k, perhaps among those of the groups whose best is highest
                (DeepSeek-V2); weights are their scores, divided by their sum where that is asked for (Mixtral,
                Qwen-MoE, OLMoE). A softmax over the top k's logits (gpt-oss) is the same with the sum.
    sigmoid     scores one by one; the choice is by score plus a correction (DeepSeek-V3, GLM-4-MoE), among the experts
                of the groups whose two best add up to most; weights are the scores, divided and scaled

An expert that is left out is minus infinity before any of it, so that the others' scores are what they are without it:
a zero behind the choice would lose its place among the top k, and its share of the sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router does with its logits.

    Args:
        top_k: experts a token.
        sigmoid: whether scores are those of each expert alone.
        normalised: whether the weights of a token's experts are divided by their sum.
        scale: what weights are multiplied by at the end.
        groups, of_groups: runs of experts, and how many of them a token may choose from.
        counts_chosen: whether the published routed probability of an expert is that of the tokens that chose it alone
            (DeepSeek's families), and not that of all.
    """

    top_k: int
    sigmoid: bool = False
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    of_groups: int = 1
    counts_chosen: bool = False

    @property
    def leaders(self) -> int:
        """How many of a group's best scores are added up to that of the group."""
        return 2 if self.sigmoid else 1

    @property
    def fewest(self) -> int:
        """Fewest experts that this choice works with: as many in each group."""
        return self.groups * max(-(-self.top_k // self.of_groups), self.leaders)


def probabilities(logits: Tensor, routing: Routing) -> Tensor:
    """The score of each expert [tokens, experts], in float32 or wider; an expert at minus infinity has 0."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.sigmoid() if routing.sigmoid else wide.softmax(-1)


def chosen(
    logits: Tensor, routing: Routing, allowed: Tensor | None = None, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token's experts: their weights [tokens, top k], in float32 or wider, and their numbers [tokens, top k].

    Args:
        logits: [tokens, experts].
        allowed: which experts there are, bool, [experts] or [tokens, experts]; None for all.
        correction: what is added to scores for the choice alone [experts]; None for nothing.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    scores = probabilities(logits, routing)
    ranks = scores.detach() if correction is None else scores.detach() + correction
    if allowed is not None:
        ranks = ranks.masked_fill(~allowed, float("-inf"))
    if routing.groups > 1:
        by_group = ranks.reshape(*ranks.shape[:-1], routing.groups, -1)
        best = by_group.topk(routing.leaders, dim=-1)[0].sum(-1).topk(routing.of_groups, dim=-1)[1]
        open_ = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
        ranks = by_group.masked_fill(~open_.unsqueeze(-1), float("-inf")).flatten(-2)
    numbers = ranks.topk(routing.top_k, dim=-1)[1]
    weights = scores.gather(-1, numbers)
    if routing.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if routing.sigmoid else 0.0))
    return weights * routing.scale, numbers
