"""What experts are worth, token by token: rows [tokens, experts] that a pass adds up.

probability     of a router over all its experts, chosen or not; where scores are those of each expert alone, and in
                all of DeepSeek's families, the weights of the chosen and 0 for the rest (arXiv 2406.02500, as its code
                has it for each family)
reap            a chosen expert's weight, of weights that add up to 1, times the norm of what it writes (REAP, arXiv
                2510.13999); the score is the mean over the tokens that chose it
lost            squared error of a layer's output without each expert, with another chosen in its place (as in
                arXiv 2402.14800), over the squared output
"""

import torch
from torch import Tensor

from compresso.core.routing import Routing, chosen, probabilities


def probability_rows(logits: Tensor, weights: Tensor, numbers: Tensor, routing: Routing) -> Tensor:
    """A token's routed probability of each expert [tokens, experts], float32.

    Args:
        logits: of the router [tokens, experts].
        weights, numbers: of the chosen [tokens, top k].

    Example, of probabilities .7, .2, .1 and .1, .6, .3 with two chosen: these, or where the chosen count alone
        .7, .2, 0 and 0, .6, .3
    """
    if not (routing.sigmoid or routing.counts_chosen):
        return probabilities(logits, routing).float()
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, numbers, weights.float())


def reap_rows(weights: Tensor, numbers: Tensor, norms: Tensor) -> Tensor:
    """Weight times norm of a token's chosen experts, at their places [tokens, experts], float64.

    Args:
        weights, numbers: of the chosen [tokens, top k]; weights are made to add up to 1.
        norms: of what each expert writes for each token [tokens, experts]; only those of the chosen are read.
    """
    share = weights.double()
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-20)
    found = share * norms.double().gather(-1, numbers)
    return torch.zeros_like(norms, dtype=torch.float64).scatter(-1, numbers, found)


def lost_rows(logits: Tensor, routing: Routing, written: Tensor, correction: Tensor | None = None) -> Tensor:
    """Of each token and each expert, |y - y without it|^2 / |y|^2 [tokens, experts], float64.

    Args:
        logits: of the router [tokens, experts].
        written: by every expert for every token [experts, tokens, hidden].
        correction: see `chosen`.
    """
    n = logits.shape[-1]

    def mixed(allowed: Tensor | None) -> Tensor:
        weights, numbers = chosen(logits, routing, allowed, correction)
        tokens = torch.arange(len(logits), device=logits.device).unsqueeze(-1)
        return (written[numbers, tokens].double() * weights.double().unsqueeze(-1)).sum(1)

    whole = mixed(None)
    size = whole.square().sum(-1).clamp(min=1e-20)
    every = torch.ones(n, dtype=torch.bool, device=logits.device)
    columns: list[Tensor] = []
    for expert in range(n):
        others = every.clone()
        others[expert] = False
        columns.append((whole - mixed(others)).square().sum(-1) / size)
    return torch.stack(columns, dim=-1)
