"""What a sweep does to linears whose inputs can be rescaled: choose a scale, move it into what feeds them, and round
(AWQ, SmoothQuant).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresso.arch.producers import Feeder
from compresso.observe.folds import Stats, across, second_moment
from compresso.sweep.targets import Group, matrix
from compresso.sweep.visitors import Edit

Found = tuple[Tensor, Mapping[str, Any]]
"""A scale [in], and facts to note."""
Search = Callable[[Tensor, Stats], Found]
"""Weights [out, in] of a group's linears, one below the other, and what they read -> the scale of their inputs."""
RoundOne = Callable[[str, Tensor, Stats, Tensor], Tensor]
"""A linear's name, its scaled weights [out, in], what it reads unscaled, and the scale [in] -> its rounded weights."""


@across("sum")
def moment_and_size(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Fold: the sum of x x^T above the sum of |x|, [in + 1, in]."""
    size = inputs.shape[1]
    found = inputs.new_zeros(size + 1, size) if total is None else total
    second_moment(found[:size], inputs)
    found[size] += inputs.abs().sum(dim=0)
    return found


@across("max")
def largest(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Fold: the largest |x| of each input [in]."""
    found = inputs.abs().amax(dim=0) if len(inputs) else inputs.new_zeros(inputs.shape[1])
    return found if total is None else torch.maximum(total, found)


def rescaled(model: nn.Module, search: Search, rounded: RoundOne) -> Edit:
    """An edit that scales a group's weights, divides what feeds them, and rounds; a group that nothing feeds is rounded
    alone, and so is one whose feeder has other readers (`compresso.sweep.shared_scale` has scaled it before), or that
    no token reached.
    """

    def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
        pieces = [matrix(model, name).float() for name in group.names]
        scale, facts = torch.ones_like(pieces[0][0]), dict[str, Any]()
        alone = group.producer is not None and not group.producer.readers and seen.n > 0
        if alone and group.producer is not None:
            scale, found = search(torch.cat(pieces), seen)
            divide_(model, group.producer, scale)
            facts |= found
        for name, piece in zip(group.names, pieces, strict=True):
            matrix(model, name).copy_(rounded(name, piece * scale, seen, scale))
        return {name: {**facts, "scaled": alone} for name in group.names}

    return edit


@torch.no_grad()
def divide_(model: nn.Module, producer: Feeder, scale: Tensor) -> None:
    """Divide a producer's outputs by a scale [outputs], in its parameters."""
    module = model.get_submodule(producer.module)
    if producer.expert is not None:  # gate above up, [2 x width, in]
        up = module.get_parameter("gate_up_proj").data[producer.expert][len(scale) :]
        up.copy_(up.float() / scale[:, None])
        return
    for name, parameter in module.named_parameters():
        wide, offset = parameter.float(), float(producer.one_plus and name == "weight")
        parameter.copy_((wide + offset) / (scale[:, None] if parameter.dim() == 2 else scale) - offset)
