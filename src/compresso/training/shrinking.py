"""LoRA tuning while chosen units shrink to exactly zero (HESSO's schedule; LoRAShear, arXiv 2310.18356).

A unit is scaled as a whole, base entries and adapter entries together, by one number that multiplies it where its axis
has gates. The base stays as it was read, so the state of a run is the adapters, this number and the period in which
each unit was chosen: a few bytes a unit, kept as buffers, so that training checkpoints carry them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from compresso.core.axis import Axis
from compresso.core.half_space import leaves_half_space, shrink_factor
from compresso.core.lora_score import Criterion, Part, lora_scores, unit_products
from compresso.core.loss import TrainingLoss
from compresso.edit.gate import GateSites, gated
from compresso.edit.lora import adapter_factors
from compresso.solve.greedy import Flat
from compresso.training.order import Micro

Choose = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(period from 1, scores [size], removed units [size] bool) -> masks [size], 0 for each unit that is to be removed by
the end of that period.
"""


class ShrinkingObjective(nn.Module):
    """The loss of a model whose redundant units shrink; owns their scales.

    Args:
        model: the model with adapters; base weights frozen.
        axes: heads and channels that may be removed.
        weights: parameter name in the base model -> the base weight.
        choose: which units are removed by the end of a period.
        loss: of the scaled model on a batch.
        starts: update at which the first period begins.
        length: updates of a period, at least 2.
        periods: how many.
        eps: of the half-space step.
        criteria: weights of the scores' criteria.
        within_kinds: compare scores relative to those of the same kind.
    """

    scale: Tensor
    """What multiplies each unit [units], float32; 1 for the kept ones."""
    turn: Tensor
    """The period, from 1, in which each unit was chosen to leave [units], int64; 0 for the kept ones."""
    chosen: Tensor
    """Periods whose units have been chosen [1], int64."""

    def __init__(
        self,
        model: PeftModel,
        axes: Sequence[Axis],
        weights: Mapping[str, Tensor],
        choose: Choose,
        *,
        loss: TrainingLoss,
        starts: int,
        length: int,
        periods: int,
        eps: float,
        criteria: Mapping[Criterion, float],
        within_kinds: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.axes, self.choose, self.loss, self.eps = list(axes), choose, loss, eps
        self.criteria, self.within_kinds = criteria, within_kinds
        self.starts, self.length, self.periods = starts, length, periods
        self._weight, self._flat = weights.__getitem__, Flat(self.axes)
        self.register_buffer("scale", torch.ones(self._flat.units))
        self.register_buffer("turn", torch.zeros(self._flat.units, dtype=torch.int64))
        self.register_buffer("chosen", torch.zeros(1, dtype=torch.int64))
        self._sites: GateSites | None = None
        self._before: tuple[int, Part] = (-1, lambda name: None)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Scale the units while this is entered; recomputation in the backward pass sees the same scales."""
        with gated(self.model, self.axes, {}) as sites:
            self._sites = sites
            try:
                yield
            finally:
                self._sites = None

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels. Returns {"loss": []}."""
        if self._sites is None:
            raise RuntimeError("ShrinkingObjective runs inside `with objective.attached():`")
        if self._before[0] != micro.update:
            self._before = (micro.update, self._added(copied=True))
        self._sites.set({} if micro.update <= self.starts else self._flat.split(self.scale))
        return {"loss": self.loss(self.model, batch)}

    @torch.no_grad()
    def shrink_(self, update: int) -> dict[str, float]:
        """Choose and shrink after an update; returns the number of units at zero and the mean scale, to log.

        Nothing is lost with an update that was skipped: its period chooses at the next one, and units of past periods
        are zero in any case.
        """
        step = update - self.starts
        if step < 0:
            return {"at_zero": 0.0, "mean_scale": 1.0}
        period, t = (
            min(step // self.length, self.periods),
            step % self.length,
        )  # periods that are over; step of the running one
        if (period < self.periods and t > 0) or int(self.chosen) < period:
            self._choose_(min(period + (t > 0), self.periods))
        if period < self.periods and t > 0:
            self._step_(shrink_factor(t, self.length), period + 1)
        self.scale[(self.turn > 0) & (self.turn <= period)] = 0
        return {"at_zero": float((self.scale == 0).sum()), "mean_scale": float(self.scale.mean())}

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """1 for each kept unit and 0 for each that is zero: axis name -> [size]. RuntimeError if a unit is
        neither.
        """
        if not bool(((self.scale == 0) | (self.scale == 1)).all()):
            raise RuntimeError("units are still shrinking; masks are read after the last period")
        return {name: scale.cpu().clone() for name, scale in self._flat.split(self.scale).items()}

    def _choose_(self, period: int) -> None:
        """Mark the units that a period takes, once."""
        if int(self.chosen) >= period:
            return
        scores = lora_scores(self.axes, self._weight, self._added(), self.criteria, self.within_kinds)
        kept = self._flat.join(self.choose(period, scores, self._flat.split(self.turn.cpu() > 0))).to(self.turn.device)
        self.turn[(self.turn == 0) & (kept == 0)] = period
        self.chosen.fill_(period)

    def _step_(self, factor: float, period: int) -> None:
        """Shrink the units of a period; those that leave the half space around their old value are zero at once."""
        old, trial = self.scale, torch.where(self.turn == period, self.scale * factor, self.scale)
        inner, squared = torch.ones_like(old), torch.ones_like(old)
        shrinking, before, after = self._flat.split((trial != old) & (old > 0)), self._before[1], self._added()
        for axis, of_axis, size in zip(
            self.axes, self._flat.split(inner).values(), self._flat.split(squared).values(), strict=True
        ):
            if bool(shrinking[axis.name].any()):
                was, now = self._with_base(before), self._with_base(after)
                of_axis.copy_(unit_products(axis, now, was))
                size.copy_(unit_products(axis, was, was))
        left = (trial != old) & leaves_half_space(old * trial * inner, old.square() * squared, self.eps)
        self.scale.copy_(torch.where(left, 0.0, trial))

    def _added(self, copied: bool = False) -> Part:
        """What the adapters add to each weight, as they are now or, copied, as they stay."""
        factors = {
            name: (b.clone(), a.clone(), scale) if copied else (b, a, scale)
            for name, (b, a, scale) in adapter_factors(self.model).items()
        }

        def added(name: str) -> Tensor | None:
            if name not in factors:
                return None
            b, a, scale = factors[name]
            return scale * (b.float() @ a.float())

        return added

    def _with_base(self, added: Part) -> Part:
        """Base weights plus what adapters add."""

        def whole(name: str) -> Tensor:
            base, more = self._weight(name).float(), added(name)
            return base if more is None else base + more

        return whole
