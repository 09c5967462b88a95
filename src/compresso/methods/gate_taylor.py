"""Gate-Taylor: one-shot removal of the units whose gates the loss minds least, all kinds and layers in one pool.

The squared gradient of each example's loss with respect to a unit's gate at 1 (the gates' diagonal Fisher information;
Michel et al., arXiv 1905.10650, use its absolute first-order form), divided by the unit's parameters. The strong
one-shot baseline that every learned method here is measured against; also the starting point of Compresso's gates under
`start: score`.
"""

from collections.abc import Sequence
from typing import Annotated

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.budget import Budget
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.observe.gate_taylor import sensitivity_per_cost
from compresso.solve.allocation import Allocation, allocated
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
        allocation: "global" (one pool), "per_layer" (equal shares), "sensitivity" (shares by score) or "exact" (integer
            programming).
    """

    removes: Removes = Removes()
    calibrates: Calibrates = Calibrates()
    allocation: Annotated[Allocation, Knobs(after="layout")] = "global"

    def __post_init__(self) -> None:
        """Refuse query heads. Raises ValueError."""
        self.removes.no_queries()

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One forward and backward pass over the calibration data."""
        return [Passes("calibration", self.calibrates.examples, backwards=1)]

    def __call__(self, job: Job) -> Job:
        """Score on calibration batches, allocate, shrink."""
        axes, cost = self.removes.among(job.arch.axes(job.model)), job.cost()
        batches = list(self.calibrates.read(job.batches(self.calibrates.batch, "gate_taylor")))
        how = job.observing("scores", job.same("gate_taylor", self))
        scores = sensitivity_per_cost(job.model, axes, cost, batches, self.removes.of, how, job.task.loss)
        priced = [axis for axis in axes if axis.name in scores]  # what takes nothing of the count stays
        plan = allocated(self.allocation, priced, scores, cost, self.budget()) if priced else Plan()
        return job.without(plan.masks(axes), "gate_taylor", calibration_examples=self.calibrates.examples)
