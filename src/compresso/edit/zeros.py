"""Zeros that stay: which weights of a model are 0 now, and how they are set back to 0 whenever something moved them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INFERRED = 0.1
"""Share of zeros from which a linear counts as pruned (IST-DASLab/SparseFinetuning, arXiv 2310.06927)."""


@dataclass(frozen=True)
class Zeros:
    """Zeros of some parameters.

    Args:
        masks: parameter name -> True where it is 0, of its shape; a byte a weight.
    """

    masks: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, weights: Sequence[str], least: float = 0.0) -> "Zeros":
        """The zeros of parameters, by full name, of which at least the share `least`, and at least one number, is 0."""
        found = {name: model.get_parameter(name).detach() == 0 for name in weights}
        return Zeros({name: mask for name, mask in found.items() if mask.any() and float(mask.float().mean()) >= least})

    @property
    def counted(self) -> dict[str, int]:
        """How many, by parameter."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Set them to 0 again."""
        for name, mask in self.masks.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(mask.to(weight.device), 0)
