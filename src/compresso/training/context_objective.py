"""A task's loss under gates on the context, plus what is live of it times a weight that dual ascent sets (Dynamic
Context Pruning, arXiv 2305.15805, section 3).

The share that is live counts real entries alone: pairs of a query and another token that it sees. The public code also
counts the upper triangle, which is constant, so that its weight of .3 is about .15 here.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresso.core.context_gates import raised
from compresso.core.loss import TrainingLoss
from compresso.core.schedule import Schedule
from compresso.edit.context_gates import ContextGates
from compresso.training.order import Micro


class ContextObjective(nn.Module):
    """A model and the gates that are held on it.

    Args:
        model: with adapters, trainable or frozen weights.
        gates: held on it.
        loss: what it minimises on a batch; None for what the gates of each layer change there (`ContextGates.apart`,
            which must be on).
        alpha: of the gates, by update.
        gamma: weight of the live share, its start where there is a target.
        target: live share that dual ascent leads to; None for a fixed weight.
        rate: of dual ascent, an update.
        by_least: see `ContextGates.at`.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: ContextGates,
        loss: TrainingLoss | None,
        alpha: Schedule,
        *,
        gamma: float,
        target: float | None,
        rate: float,
        by_least: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.gates, self.loss, self.alpha = model, gates, loss, alpha
        self.target, self.rate, self.fixed, self.by_least = target, rate, gamma, by_least
        # a parameter, so that the gap, its gradient, is averaged over micro-batches and processes
        self.gamma = nn.Parameter(torch.full((1,), gamma)) if target is not None else None

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels.

        Returns:
            "loss" [] to differentiate, and to log: "language" (without the live share), "live", "gamma" and "alpha".
        """
        alpha = self.alpha(micro.update)
        self.gates.at(alpha, self.by_least)
        language = self._changed(batch) if self.loss is None else self.loss(self.model, batch)
        live = self.gates.live()
        weight = torch.tensor(self.fixed) if self.gamma is None else self.gamma.detach()[0]
        total = language + weight.to(live.device) * live
        if self.gamma is not None and self.target is not None:
            gap = live.detach() - self.target
            total = total + ((self.gamma - self.gamma.detach())[0] * gap).to(total.dtype)
        return {
            "loss": total,
            "language": language.detach(),
            "live": live.detach(),
            "gamma": weight.detach().clone(),
            "alpha": torch.tensor(alpha),
        }

    def _changed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum over layers of what their gates change there."""
        body = cast(Any, self.model).base_model
        body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return self.gates.error()

    @torch.no_grad()
    def ascend_(self) -> None:
        """A step of dual ascent, by the gap that lies in the gradient."""
        if self.gamma is not None and self.gamma.grad is not None:
            self.gamma.fill_(raised(float(self.gamma), float(self.gamma.grad), 0.0, self.rate))
