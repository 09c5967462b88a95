"""Where ristretto's search begins: layers in the order of block influence, widths by errors or by gradients; no method.

Errors of a bank are those of one sub-layer at a time, and do not see what the loss minds. Gradients do: near the widths
that gate-Taylor leaves (Michel et al., arXiv 1905.10650), and with the bank's units and weights, half of SmolLM2's
blocks are 1.63 nats a token from dense, by the bank's errors alone 1.88 (docs/log.md).
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.counted import counted
from compresso.core.plan import Plan
from compresso.core.quantities import Budgeted
from compresso.job import Job
from compresso.observe.gate_taylor import sensitivity_per_cost
from compresso.observe.influence import block_influence
from compresso.solve.allocate import allocate
from compresso.solve.bank_choice import Menu, alone, beginnings, near
from compresso.solve.level_choice import Item, Levels
from compresso.stage import Calibrates
from compresso.training.order import ShuffledBatches

log = logging.getLogger(__name__)
SCORED = (Kind.HEAD, Kind.CHANNEL)
"""What gradients of gates are taken of."""


@dataclass(frozen=True)
class Beginnings:
    """Choices that are judged before a search goes on from the best of them.

    Args:
        job: with the rows that may be looked at; its model, dense, stays as it is.
        calibrates: how many of them.
        choice, priced, limit: the levels, what they cost, and what all may cost together.
        same: what a resume must agree on.
    """

    job: Job
    calibrates: Calibrates
    choice: Menu
    priced: Sequence[Item]
    limit: float
    same: Mapping[str, Any]

    def order(self, layers: Axis) -> list[int]:
        """Layers in the order of least block influence."""
        job, batches = self.job, self.calibrates.read(self._batches)
        how = job.observing("influence", self.same)
        scores = block_influence(job.model, job.arch.blocks(job.model), [layers], (Kind.LAYER,), batches, how).scores
        return torch.argsort(scores[layers.name], stable=True).tolist()

    def with_layers_gone(self, order: Sequence[int], most: int, *, even: bool) -> list[Levels]:
        """From no layer gone to layers alone; see `compresso.solve.bank_choice.beginnings`."""
        return beginnings(self.choice, self.priced, self.limit, order[: len(order) - 1], most, even=even)

    def few_gone(self, order: Sequence[int], most: int) -> list[int]:
        """Numbers of layers that are gone in beginnings by gradients, `most` of them or as many as there are; fewer
        are said.

        order: of layers; empty where none may leave.
        """
        enough = alone(self.choice, self.priced, self.limit, order)
        found = list(dict.fromkeys(-(-i * enough // most) for i in range(most)))
        found = [n for n in found if n < max(enough, 1)]
        if len(found) < most:
            told = "no layer may leave" if not order else f"{counted(enough, 'layer')} gone would be enough alone"
            log.warning("ristretto: %d of %d beginnings by gradients, since %s", len(found), most, told)
        return found

    def by_gradients(self, keep: float, of: Budgeted, kinds: Sequence[Kind], gone: Sequence[int]) -> Levels | None:
        """Widths near those of gate-Taylor with as large a share of heads in every layer, of the model without some
        layers; None where none are needed or none fit, which is said.

        keep, of, kinds: what stays of the whole model, of what, and what may leave.
        gone: the layers that are gone; all others stay.

        Raises:
            NumericError: a gradient is not finite.
        """
        whole = float(self.job.cost()().count(of))
        job = self._without(gone)
        stays = [layer for layer in range(self.choice.bank.layers) if layer not in gone]
        here = {  # axes are named by the number of their layer, of those that are there
            one.units: one.units.replace(f"layers.{one.layer}.", f"layers.{stays.index(one.layer)}.", 1)
            for one in self.choice.sub_layers
            if one.layer in stays and one.units is not None
        }
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind in kinds and axis.name in here.values()]
        kinds = tuple(kind for kind in SCORED if any(axis.kind == kind for axis in axes))
        cost, told = job.cost(), f"ristretto: no beginning by gradients with {counted(len(gone), 'layer')} gone"
        share = keep * whole / float(cost().count(of))
        if share >= 1:
            log.warning("%s: nothing else has to leave", told)
            return None
        budget = Budget(share, of, kinds, floor={Kind.HEAD: "keep"} if Kind.HEAD in kinds else {})
        name = f"gradients-{len(gone)}" if gone else "gradients"
        batches, how = self.calibrates.read(self._batches), job.observing(name, self.same)
        scores = sensitivity_per_cost(job.model, axes, cost, batches, of, how, job.task.loss)
        try:
            plan = allocate([axis for axis in axes if axis.name in scores], scores, cost, budget)
            kept = job.ranks.agreed({name: len(units) for name, units in plan.kept.items()})
            there = {units: kept[name] for units, name in here.items() if name in kept}
            return near(self.choice, self.priced, self.limit, there, gone)
        except InfeasibleBudget as error:
            log.warning("%s: %s", told, error)
            return None

    def _without(self, gone: Sequence[int]) -> Job:
        """The job without these layers, on a model of its own; as it is where none are gone."""
        if not gone:
            return self.job
        job = replace(self.job, model=copy.deepcopy(self.job.model))
        (layers,) = (axis for axis in job.arch.axes(job.model) if axis.kind == Kind.LAYER)
        stays = tuple(layer for layer in range(layers.size) if layer not in gone)
        return job.without(Plan({layers.name: stays}).masks([layers]), "ristretto")

    @property
    def _batches(self) -> ShuffledBatches:
        return self.job.batches(self.calibrates.batch, "ristretto")
