"""How a linear is fitted in a repair: which ridges and mixtures are tried, and what each of them misses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.repair import Moments, error, refitted


@dataclass(frozen=True)
class Fit:
    """How one linear is fitted.

    Args:
        residual: whether y* is that of the dense stream; else of the dense sub-layer alone.
        alphas: shares of the residual target to try.
        ridges: to try.
        weighted: whether a token counts by one over the squared norm of the stream that it is led to; else all alike.
        to_old: whether the ridge pulls to the old weight; else to zero.
    """

    residual: bool = True
    alphas: Sequence[float] = (0.0, 0.5, 1.0)
    ridges: Sequence[float] = (0.03, 0.3, 3.0)
    weighted: bool = True
    to_old: bool = True

    @property
    def mixes(self) -> bool:
        """Whether the dense sub-layer's own target is needed."""
        return not self.residual or any(alpha < 1 for alpha in self.alphas)

    def candidates(self, old: Tensor, seen: Moments, held: Moments) -> list["Candidate"]:
        """For each ridge the fitted weight whose mixture misses the held-out targets least.

        Raises NotPositiveDefiniteError.
        """
        start = old if self.to_old else torch.zeros_like(old)
        found: list[Candidate] = []
        for ridge in self.ridges:
            of_ridge: list[Candidate] = []
            for alpha in self.alphas if self.residual else (0.0,):
                weight = refitted(start, seen.inputs, seen.cross_of(alpha), ridge).to(old.dtype)
                of_ridge.append(Candidate(weight, alpha, ridge, error(weight, held)))
            found.append(min(of_ridge, key=lambda one: one.missed))
        return found


@dataclass(frozen=True)
class Candidate:
    """A weight that may take the old one's place.

    Args:
        weight: [out, in], in the old one's dtype.
        alpha, ridge: it was fitted with.
        missed: its relative error on held-out tokens.
    """

    weight: Tensor
    alpha: float
    ridge: float
    missed: float
