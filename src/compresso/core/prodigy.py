"""Prodigy: Adam that finds its own rate (Mishchenko, Defazio, arXiv 2306.06101, algorithm 4).

The rate is d, a lower bound on how far the parameters have to go: it begins tiny, and grows as gradients keep agreeing
with the way covered from the start. Without weight decay, bias correction and a bound on growth, which is how BESA's
code (arXiv 2402.16880) calls it; the library's `safeguard_warmup` is not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _State:
    """Of one tensor: where it began, moments of its gradients scaled by d, and the weighted sum of its gradients."""

    start: Tensor
    first: Tensor
    second: Tensor
    summed: Tensor


class Prodigy:
    """Steps of Prodigy over some tensors.

    Args:
        parameters: changed in place by `step`, by their gradients.
        lr: factor on the rate that is found.
        betas: of the first and the second moment.
        coefficient: `d_coef`, factor on the estimate of d.
        begin: d before the first step.
        eps: beside the root of the second moment, in units of d.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        coefficient: float = 1.0,
        begin: float = 1e-6,
        eps: float = 1e-8,
    ) -> None:
        self._parameters, self._lr, self._betas = list(parameters), lr, betas
        self._coefficient, self._begin, self._eps = coefficient, begin, eps
        self.d, self._greatest, self._agreed = begin, begin, 0.0
        self._states = [_State(p.detach().clone(), *(torch.zeros_like(p) for _ in range(3))) for p in self._parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update by the gradients; tensors without one stay."""
        (beta1, beta2), d = self._betas, self.d
        beta3, rate = beta2**0.5, d * self._lr
        there = [(p, p.grad, s) for p, s in zip(self._parameters, self._states, strict=True) if p.grad is not None]
        along = 0.0
        for parameter, gradient, state in there:
            along += float((gradient * (state.start - parameter)).sum())
            state.first.mul_(beta1).add_(gradient, alpha=(1 - beta1) * d)
            state.second.mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * d**2)
            state.summed.mul_(beta3).add_(gradient, alpha=d / self._begin * rate)
        self._agreed = beta3 * self._agreed + d / self._begin * rate * along
        travelled = sum(float(state.summed.abs().sum()) for _, _, state in there)
        if travelled == 0:
            return
        estimate = self._coefficient * self._agreed / travelled
        if d == self._begin:
            self.d = max(d, estimate)
        self._greatest = max(self._greatest, estimate)
        self.d = self._greatest
        for parameter, _, state in there:
            parameter.addcdiv_(state.first, state.second.sqrt().add_(self.d * self._eps), value=-rate)
