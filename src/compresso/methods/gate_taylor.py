"""Gate-Taylor: one-shot removal of the units whose gates the loss minds least, all kinds and layers in one pool.

The squared gradient of each example's loss with respect to a unit's gate at 1 (the gates' diagonal Fisher information;
Michel et al., arXiv 1905.10650, use its absolute first-order form), divided by the unit's parameters. The strong
one-shot baseline that every learned method here is measured against; also the starting point of Compresso's gates under
`start: score`. Layers, attentions and MLPs, of which gradients say little, join the pool by the loss without each
(`observe/pooled.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge, Gt
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.budget import Budget
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.observe.pooled import PARTS, Looks, n_losses, pooled_per_cost
from compresso.solve.allocation import Allocation, allocated
from compresso.solve.depth import absorbed
from compresso.stage import Calibrates, Effects, Knobs, Passes, Removes, stage


@stage(
    "gate_taylor",
    title="removes the units whose gates the loss minds least, per parameter",
    paper="1905.10650",
    effects=Effects.SHAPES,
    needs=("data", "gradients"),
    when="One pass over a few hundred examples; good up to about half of the blocks with LoRA recovery afterwards.",
    failures=(
        "Scores units one at a time: redundant units look dispensable together, so very deep cuts take whole skills"
        " away."
    ),
    any_task=True,
)
class GateTaylor:
    """Knobs of gate-Taylor removal.

    Args:
        removes: see `Removes`.
        calibrates: see `Calibrates`.
        depth_batches: of its batches, the first so many are behind the scores of layers, attentions and MLPs, each of
            which takes a forward pass over them.
        depth_weight: what the loss without such a part counts for beside what units cost; below 1 where
            training behind it is thought to give back more of it.
        allocation: "global" (one pool), "per_layer" (equal shares), "sensitivity" (shares by score) or "exact" (integer
            programming).
    """

    removes: Removes = Removes()
    calibrates: Calibrates = Calibrates()
    depth_batches: Annotated[int, Ge(1), Knobs(after="floor")] = 1
    depth_weight: Annotated[float, Gt(0), Knobs(after="depth_batches")] = 1.0
    allocation: Annotated[Allocation, Knobs(after="layout")] = "global"

    def __post_init__(self) -> None:
        """Refuse query heads. Raises ValueError."""
        self.removes.no_queries()

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One forward and backward pass over the calibration data, and one over its first part without each layer."""
        looks = [Passes("calibration", self.calibrates.examples, backwards=1)]
        if set(self.removes.kinds) <= set(PARTS):
            looks = []
        if forwards := n_losses(arch.axes(model), self.removes.kinds):
            looks.append(Passes("search", self.depth_batches * self.calibrates.batch, forwards=forwards))
        return looks

    def __call__(self, job: Job) -> Job:
        """Score on calibration batches, allocate, shrink."""
        axes, cost = self.removes.among(job.arch.axes(job.model)), job.cost()
        source = job.batches(self.calibrates.batch, "gate_taylor")
        batches = list(self.calibrates.read(source))
        first = list(replace(self.calibrates, batches=self.depth_batches).read(source))
        same = job.same("gate_taylor", self)
        depth = Looks(first, job.rounds("depth", same), job.rounds("pools", same), job.progress())
        how, weight, loss = job.observing("scores", same), self.depth_weight, job.task.loss
        budget = self.budget()
        scores = pooled_per_cost(job.model, axes, cost, budget, batches, depth, weight=weight, how=how, loss=loss)
        priced = [axis for axis in axes if axis.name in scores]  # what takes nothing of the count stays
        plan = allocated(self.allocation, priced, scores, cost, self.budget()) if priced else Plan()
        n = self.calibrates.among(len(job.rows))
        return job.without(absorbed(axes, plan.masks(axes)), "gate_taylor", calibration_examples=n)
