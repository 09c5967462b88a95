"""How like the experts of a mixture are: whom its router likes together, and what each writes, on every token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compresso.arch.routers import routing_of
from compresso.core.routing import probabilities
from compresso.observe.experts import Router, alone
from compresso.observe.folds import Fold, second_moment, sums
from compresso.observe.sites import Positions, See, Site

LIKENESS_FOLDS: Mapping[str, Fold] = {"routing": second_moment, "outputs": sums}
"""By the last word of a statistic's name."""


def liked_together(mixtures: Mapping[str, Router]) -> Site:
    """Of each mixture, by its name: "NAME routing", a token's probabilities [tokens, experts], and "NAME outputs", the
    sum over tokens of what each expert writes [1, experts x hidden]. Every expert runs on every token.
    """

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        handles: list[RemovableHandle] = []

        def chooses(name: str, mixture: Router) -> Any:
            def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                see(f"{name} routing", probabilities(positions.tokens(output[0]), routing_of(mixture.router)).float())

            return hook

        def runs(name: str, mixture: Router) -> Any:
            def hook(experts: nn.Module, arguments: tuple[Any, ...]) -> None:
                states = positions.tokens(arguments[0])
                n = len(mixture.experts.get_parameter("down_proj"))
                written = [alone(mixture.experts, states, e).double().sum(0) for e in range(n)]
                see(f"{name} outputs", torch.cat(written).unsqueeze(0))

            return hook

        for name, mixture in mixtures.items():
            handles.append(mixture.router.register_forward_hook(chooses(name, mixture)))
            handles.append(mixture.experts.register_forward_pre_hook(runs(name, mixture)))
        return handles

    return site
