"""Masks on experts and on their channels: the two places of `compresso.edit.gate` where no activation is at hand.

A router's choice is made again among the experts whose mask is not 0, so that the others' shares are what they are
without it. Fused experts show no activation between their two products; the second product's weights, multiplied by the
mask while the module runs, compute the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresso.arch.routers import correction_of, routing_of
from compresso.core.routing import chosen

_Output = tuple[Tensor, Tensor, Tensor]
"""Of a router: logits [tokens, experts], weights and numbers [tokens, top k]."""


def routed(router: nn.Module, output: _Output, mask: Tensor) -> _Output:
    """What a router gives among the experts whose mask is not 0, with weights multiplied by the masks.

    Args:
        output: what it gives without masks.
        mask: [experts], or [batch, 1, experts] with one row an example.
    """
    logits, scores, numbers = output
    if mask.dim() > 1:
        mask = mask.expand(-1, len(logits) // len(mask), -1).flatten(0, 1)
    allowed = mask.detach() != 0
    weights = scores
    if not bool(allowed.all()):
        weights, numbers = chosen(logits, routing_of(router), allowed, correction_of(router))
    weights = weights * mask.to(weights).expand_as(logits).gather(-1, numbers)
    return logits.masked_fill(~allowed, float("-inf")), weights.to(scores.dtype), numbers


def run_with(
    module: nn.Module,
    forward: Callable[..., Tensor],
    folds: Sequence[tuple[str, int]],
    mask: Tensor,
    arguments: Sequence[Tensor],
    named: Mapping[str, Tensor],
) -> Tensor:
    """What a module computes with some of its parameters multiplied by a mask; example by example where these have
    masks of their own.

    Args:
        forward: of the module.
        folds: (own name of a parameter, dimension along which the mask lies).
        mask: [size], or [batch, 1, size].
        arguments, named: tensors whose first dimension is tokens, those of an example together.
    """
    if mask.dim() > 1:
        n = len(mask)
        rows, given = [one.chunk(n) for one in arguments], {name: one.chunk(n) for name, one in named.items()}
        each = [
            run_with(module, forward, folds, one, [part[i] for part in rows], {k: part[i] for k, part in given.items()})
            for i, one in enumerate(mask.squeeze(1))
        ]
        return torch.cat(each)
    parameters: dict[str, Any] = module._parameters
    own = {name: parameters[name] for name, _ in folds}
    try:
        for name, dim in folds:
            shape = [-1 if d == dim else 1 for d in range(own[name].dim())]
            parameters[name] = own[name] * mask.to(own[name]).reshape(shape)
        return forward(*arguments, **named)
    finally:
        parameters.update(own)
