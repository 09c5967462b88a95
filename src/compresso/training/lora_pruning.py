"""LoRA tuning while units are scored by adapter gradients and masked for good (LoRAPrune, arXiv 2305.18403).

Scores and masks are one number a unit each, kept as buffers, so that training checkpoints carry them and a resumed run
prunes as the uninterrupted one. Gradients are read after the backward passes of an update, averaged over micro-batches
and processes, unscaled and before they are clipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from compresso.core.axis import Axis
from compresso.core.lora_gradient import Factors, moved_average, unit_importance
from compresso.core.loss import TrainingLoss
from compresso.edit.gate import GateSites, gated
from compresso.edit.lora import adapter_parameters
from compresso.solve.greedy import Flat
from compresso.training.order import Micro

Choose = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor] | None]
"""(update, scores [size], removed units [size] bool) -> masks [size], or None where this update prunes nothing."""


class PruningObjective(nn.Module):
    """A loss under masks that only ever lose units.

    Args:
        model: the model with adapters; base weights frozen.
        axes: heads and channels that may be removed.
        weights: parameter name in the base model -> the base weight.
        choose: which units remain after an update.
        loss: of the masked model on a batch.
        momentum: of the scores' moving average.
    """

    score: Tensor
    """Moving average of the importance of each unit [units], float64; without meaning for removed units."""
    mask: Tensor
    """1 for each remaining unit, 0 for each removed one [units], float32."""

    def __init__(
        self,
        model: PeftModel,
        axes: Sequence[Axis],
        weights: Mapping[str, Tensor],
        choose: Choose,
        loss: TrainingLoss,
        momentum: float = 0.9,
    ) -> None:
        """Check that every axis has adapters.

        Raises:
            ValueError: an axis has no adapter.
        """
        super().__init__()
        self.model = model
        self.axes, self.choose, self.loss, self.momentum = list(axes), choose, loss, momentum
        self._weight, self._flat = weights.__getitem__, Flat(self.axes)
        adapted = adapter_parameters(model)
        for axis in self.axes:
            if not any(piece.param in adapted for piece in axis.slices):
                raise ValueError(
                    f"no linear of {axis.name} has an adapter, so LoRA gradients say nothing of its units; add its"
                    " linears to targets"
                )
        self.register_buffer("score", torch.zeros(self._flat.units, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(self._flat.units))
        self._sites: GateSites | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Mask the units while this is entered; recomputation in the backward pass sees the same masks."""
        with gated(self.model, self.axes, {}) as sites:
            self._sites = sites
            try:
                yield
            finally:
                self._sites = None

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels. Returns {"loss": []}."""
        if self._sites is None:
            raise RuntimeError("PruningObjective runs inside `with objective.attached():`")
        self._sites.set(self._flat.split(self.mask))
        return {"loss": self.loss(self.model, batch)}

    @torch.no_grad()
    def observe_(self, update: int) -> None:
        """Score by the gradients of an update, and let units go if it is time.

        Removed units are never kept again: `choose` gets them as an argument and ignores their scores.
        """
        adapters: dict[str, Factors] = {
            name: Factors(b, a, b.grad, a.grad, scale)
            for name, (b, a, scale) in adapter_parameters(self.model).items()
            if b.grad is not None and a.grad is not None
        }
        new = [unit_importance(axis, self._weight, adapters).to(self.score.device) for axis in self.axes]
        old = list(self._flat.split(self.score).values())
        self.score.copy_(torch.cat(moved_average(old, new, self.momentum)))
        chosen = self.choose(update, self._flat.split(self.score.cpu()), self._flat.split(self.mask.cpu() == 0))
        if chosen is not None:
            self.mask.mul_(self._flat.join(chosen).to(self.mask))

    def masks(self) -> dict[str, Tensor]:
        """Kept units: axis name -> [size], 0 or 1, on the CPU."""
        return {name: mask.cpu().clone() for name, mask in self._flat.split(self.mask).items()}

    def scores(self) -> dict[str, Tensor]:
        """The moving averages: axis name -> [size], float64, on the CPU."""
        return {name: score.cpu().clone() for name, score in self._flat.split(self.score).items()}
