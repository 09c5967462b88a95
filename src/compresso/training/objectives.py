"""What training minimises: a task's loss alone, or with learned gates under a budget (Compresso, arXiv 2310.05015,
section 3.2).

An objective is one module that owns the model and everything else that learns, so that every gradient is reduced over
processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compresso.core import hard_concrete
from compresso.core.axis import Kind
from compresso.core.gates import Gates
from compresso.core.loss import TrainingLoss
from compresso.core.losses import lagrangian
from compresso.edit.gate import GateSites, gated
from compresso.edit.layer_gates import effective_mask
from compresso.training.noise import NoiseAhead
from compresso.training.order import Micro

_SURELY_OPEN = 100.0  # log-alpha whose soft value is exactly 1


class LossObjective(nn.Module):
    """A loss and nothing else; for recovery and fine-tuning."""

    def __init__(self, model: nn.Module, loss: TrainingLoss) -> None:
        """model: with adapters or trainable weights; loss: what it minimises on a batch."""
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels. Returns {"loss": []}."""
        return {"loss": self.loss(self.model, batch)}


class Constraint(Protocol):
    """A budget on expected counts, that may rise during training."""

    @property
    def n_terms(self) -> int:
        """Pairs of multipliers."""
        ...

    def gaps(self, probabilities: Mapping[str, Tensor], progress: float) -> list[Tensor]:
        """Expected minus wanted sparsity, one tensor [layers or 1] per pair of multipliers."""
        ...

    def project(self, gates: Gates, progress: float) -> Tensor:
        """The shift of log-alpha, [] or [n_gates], after which the expected counts meet the target."""
        ...

    def sparsity(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Expected sparsity of the budgeted count, []."""
        ...

    def target(self, progress: float) -> float:
        """The sparsity wanted now."""
        ...


class GatedObjective(nn.Module):
    """A loss under sampled gates, plus a Lagrangian on the expected sparsity.

    Args:
        model: the model with adapters; base weights frozen.
        gates: one per unit.
        constraint: the budget.
        loss: of the gated model on a batch.
        starts: update at which pruning begins; before it the model is dense and the gates get no gradient.
        progress: update since pruning began -> share of the way to the final target.
        use_lagrangian: False where the budget is held by projection instead.
        noise: "batch": one draw an update, shared by its micro-batches and processes; "example": one draw an example.
        seed: of the noise.
        cost_aware: subtract from each gate's gradient its cost at the model's mean price, so that under projection a
            gate rises only if it is worth more than its parameters.
        layer_gates: axis kinds' layers that share one on/off gate: "none", "layer" (attention and FFN together) or
            "sublayer".
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Gates,
        constraint: Constraint,
        *,
        loss: TrainingLoss,
        starts: int,
        progress: Callable[[int], float],
        use_lagrangian: bool,
        noise: Literal["batch", "example"],
        seed: int,
        layer_gates: Literal["none", "layer", "sublayer"] = "none",
        cost_aware: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.gates = gates
        self.constraint = constraint
        self.loss = loss
        self.starts, self.progress, self.noise, self.seed = starts, progress, noise, seed
        self.lambda1 = nn.Parameter(torch.zeros(constraint.n_terms)) if use_lagrangian else None
        self.lambda2 = nn.Parameter(torch.zeros(constraint.n_terms)) if use_lagrangian else None
        self._layer_gate_of = _layer_gates(gates, layer_gates)  # axis name -> index of its layer gate
        count = len(set(self._layer_gate_of.values()))
        # mean -10: "pruning is off in this layer"; a gate that opens switches its unit masks on
        self.layer_alpha = (
            nn.Parameter(torch.full((count,), -10.0).clamp(min=hard_concrete.LOG_ALPHA_LOW)) if count else None
        )
        self._sites: GateSites | None = None
        self._noise: tuple[torch.device, NoiseAhead] | None = None
        if cost_aware:
            self.gates.log_alpha.register_post_accumulate_grad_hook(self._charge_)

    def _charge_(self, log_alpha: Tensor) -> None:
        """Take the mean price per parameter off the gradient: linear in it, so micro-batches and processes may be
        averaged afterwards.
        """
        if log_alpha.grad is not None:
            with torch.enable_grad():
                sparsity = self.constraint.sparsity(self.gates.keep_probabilities())
                (cost,) = torch.autograd.grad(sparsity, log_alpha)
            log_alpha.grad.sub_(cost * (log_alpha.grad.sum() / cost.sum()))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Gate the model while this is entered; recomputation in the backward pass sees the same masks."""
        with gated(self.model, self.gates.axes, {}) as sites:
            self._sites = sites
            try:
                yield
            finally:
                self._sites = None

    def multipliers(self) -> list[nn.Parameter]:
        """lambda1 and lambda2, which ascend."""
        return [one for one in (self.lambda1, self.lambda2) if one is not None]

    def gate_parameters(self) -> list[nn.Parameter]:
        """All log-alpha."""
        return [one for one in (self.gates.log_alpha, self.layer_alpha) if one is not None]

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels.

        Returns:
            "loss" [] to differentiate, and to log: "language" (without the Lagrangian), "sparsity" (expected),
            "target".
        """
        if self._sites is None:
            raise RuntimeError("GatedObjective runs inside `with objective.attached():`")
        if micro.update < self.starts:
            self._sites.set({})
            return {"loss": self.loss(self.model, batch)}
        rows = micro.rows if self.noise == "example" else None
        n_layer_gates = 0 if self.layer_alpha is None else len(self.layer_alpha)
        device = self.gates.log_alpha.device
        if self._noise is None or self._noise[0] != device:
            self._noise = device, NoiseAhead(self.seed, len(self.gates) + n_layer_gates, device)
        u = self._noise[1].draw(micro.update, rows)
        masks = self.gates.sample(u[..., : len(self.gates)])
        if self.layer_alpha is not None:
            masks = self._switched(masks, hard_concrete.sample(self.layer_alpha, u[..., len(self.gates) :]))
        self._sites.set(masks)
        language = self.loss(self.model, batch)
        with torch.set_grad_enabled(self.lambda1 is not None and torch.is_grad_enabled()):  # else it is only logged
            probabilities = self.keep_probabilities()
        progress = self.progress(micro.update - self.starts)
        loss = language
        if self.lambda1 is not None and self.lambda2 is not None:
            for term, gap in enumerate(self.constraint.gaps(probabilities, progress)):
                loss = loss + lagrangian(gap, 0.0, self.lambda1[term], self.lambda2[term]).mean().to(loss.dtype)
        with torch.no_grad():
            sparsity = self.constraint.sparsity(probabilities)
        target = torch.tensor(self.constraint.target(progress))
        return {"loss": loss, "language": language.detach(), "sparsity": sparsity, "target": target}

    def keep_probabilities(self) -> dict[str, Tensor]:
        """P(unit stays) by axis, with layer gates worked in."""
        probabilities = self.gates.keep_probabilities()
        return (
            probabilities
            if self.layer_alpha is None
            else self._switched(probabilities, hard_concrete.keep_probability(self.layer_alpha))
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Hold every log-alpha in the published range."""
        for one in self.gate_parameters():
            hard_concrete.clamp_(one)

    @torch.no_grad()
    def project_(self, since: int) -> None:
        """Shift log-alpha so that the expected counts meet the target of the update `since` pruning began."""
        self.gates.shift_(self.constraint.project(self.gates, self.progress(since)))

    @torch.no_grad()
    def state(self) -> dict[str, float]:
        """Multipliers and gate statistics, to log."""
        facts = {"open": float((hard_concrete.keep_probability(self.gates.log_alpha) > 0.5).float().mean())}
        if self.lambda1 is not None and self.lambda2 is not None:
            facts |= {"lambda1": float(self.lambda1.mean()), "lambda2": float(self.lambda2.mean())}
        return facts

    def final_values(self) -> dict[str, Tensor]:
        """Log-alpha by axis, detached; surely open in layers whose gate leaves them dense."""
        values = self.gates.values()
        if self.layer_alpha is None:
            return values
        switched = hard_concrete.keep_probability(self.layer_alpha.detach()) >= 0.5
        dense = {name for name, index in self._layer_gate_of.items() if not bool(switched[index])}
        return {
            name: torch.full_like(value, _SURELY_OPEN) if name in dense else value for name, value in values.items()
        }

    def _switched(self, masks: Mapping[str, Tensor], switch: Tensor) -> dict[str, Tensor]:
        """Masks in effect where layer gates [..., n] switch pruning on; axes without a layer gate are unchanged."""
        return {
            name: effective_mask(mask, switch[..., self._layer_gate_of[name]].unsqueeze(-1))
            if name in self._layer_gate_of
            else mask
            for name, mask in masks.items()
        }


def _layer_gates(gates: Gates, how: Literal["none", "layer", "sublayer"]) -> dict[str, int]:
    if how == "none":
        return {}
    keys: dict[tuple[int, Kind | None], int] = {}
    result: dict[str, int] = {}
    for axis in gates.axes:
        if axis.layer is not None:
            key = (axis.layer, axis.kind if how == "sublayer" else None)
            result[axis.name] = keys.setdefault(key, len(keys))
    return result
