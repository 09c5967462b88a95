"""What mixtures of experts do while a model runs: how their routers choose, and what the chosen write.

A layer is looked at through its router's output and its experts' input. What an expert writes for a token is computed
by the experts' own forward, asked for that expert alone with weight 1, so that any family's stacks will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compresso.arch.routers import correction_of, routing_of
from compresso.core.expert_scores import lost_rows, probability_rows, reap_rows
from compresso.errors import ArchError
from compresso.observe.folds import Fold, sums
from compresso.observe.sites import Positions, See, Site

Looked = Literal["probability", "frequency", "reap", "reconstruction"]


@dataclass(frozen=True)
class Router:
    """A mixture's modules.

    Args:
        router: gives logits, weights and numbers.
        experts: are given states, numbers and weights.
    """

    router: nn.Module
    experts: nn.Module


def numbers_kept(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: the experts that each token chose [tokens, top k], int16."""
    here = rows.to(torch.int16).cpu()
    return here if total is None else torch.cat([total, here])


FOLDS: Mapping[str, Fold] = {"probability": sums, "numbers": numbers_kept, "score": sums}
"""By the last word of a statistic's name."""


def routed(mixtures: Mapping[str, Router], score: Looked) -> Site:
    """Of each mixture, by its name: "NAME probability" and "NAME numbers", and for REAP and reconstruction "NAME
    score" [tokens, experts].
    """

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        handles: list[RemovableHandle] = []

        def chooses(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                seen[name] = output

            return hook

        def runs(name: str, mixture: Router) -> Any:
            def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                logits, weights, numbers = (positions.tokens(one) for one in seen.pop(name))
                routing = routing_of(mixture.router)
                see(f"{name} probability", probability_rows(logits, weights, numbers, routing))
                see(f"{name} numbers", numbers)
                states = positions.tokens(arguments[0])
                if score == "reap":
                    norms = norms_of(mixture.experts, states, numbers, logits.shape[-1])
                    see(f"{name} score", reap_rows(weights, numbers, norms))
                elif score == "reconstruction":
                    written = torch.stack([alone(mixture.experts, states, e) for e in range(logits.shape[-1])])
                    see(f"{name} score", lost_rows(logits, routing, written, correction_of(mixture.router)))

            return hook

        for name, mixture in mixtures.items():
            handles.append(mixture.router.register_forward_hook(chooses(name)))
            handles.append(mixture.experts.register_forward_pre_hook(runs(name, mixture)))
        return handles

    return site


def alone(experts: nn.Module, states: Tensor, expert: int) -> Tensor:
    """What one expert writes for states [tokens, hidden]."""
    numbers = torch.full((len(states), 1), expert, dtype=torch.long, device=states.device)
    written: Tensor = experts.forward(states, numbers, torch.ones_like(numbers, dtype=states.dtype))
    return written


def read_by(experts: nn.Module, stack: str, expert: int, states: Tensor) -> Tensor:
    """What one expert's matrix in a stack reads of states [tokens, hidden] that it is given: these, or behind the first
    product and the activation [tokens, width].

    Raises ArchError for a stack that is neither.
    """
    if stack == "gate_up_proj":
        return states
    if stack != "down_proj":
        raise ArchError(f"nobody described what the experts' {stack} reads; add '*.{stack}.*' to where.ignore")
    first: Tensor = experts.gate_up_proj[expert]  # pyright: ignore[reportIndexIssue, reportAssignmentType]
    inside = states @ first if getattr(experts, "is_transposed", False) else nn.functional.linear(states, first)
    bias: Any = getattr(experts, "gate_up_proj_bias", None)
    if bias is not None:
        inside = inside + bias[expert]
    return gated(experts, inside)


def gated(experts: nn.Module, inside: Tensor) -> Tensor:
    """What an expert makes of its first product [tokens, 2 x width]: act(gate) up [tokens, width]; gpt-oss has gate and
    up by turns, clamps both, and adds 1 to up (arXiv 2508.10925).
    """
    live: Any = experts
    if not getattr(experts, "is_transposed", False):
        gate, up = inside.chunk(2, dim=-1)
        found: Tensor = live.act_fn(gate) * up
        return found
    gate, up = inside[..., ::2].clamp(max=live.limit), inside[..., 1::2].clamp(-live.limit, live.limit)
    return (up + 1) * gate * torch.sigmoid(gate * live.alpha)


def norms_of(experts: nn.Module, states: Tensor, numbers: Tensor, n: int) -> Tensor:
    """The norm of what each expert writes for the tokens that chose it, 0 elsewhere [tokens, n], float64."""
    norms = torch.zeros(len(states), n, dtype=torch.float64, device=states.device)
    for expert in numbers.unique().tolist():
        which = (numbers == expert).any(-1)
        norms[which, expert] = alone(experts, states[which], expert).double().norm(dim=-1)
    return norms
