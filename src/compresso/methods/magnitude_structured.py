"""Structured magnitude pruning: each layer loses the same share of its smallest units.

The L2 norm of a unit's own weights, as the weight-only baseline of LLM-Pruner (arXiv 2305.11627, section 3.2, "L2").
Every layer keeps the same number of units of a kind, because magnitudes of different layers and kinds do not compare.
Needs no data.
"""

from collections.abc import Sequence
from typing import Annotated

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.budget import Budget
from compresso.core.score import magnitude
from compresso.job import Job
from compresso.solve.allocate import keep_best
from compresso.solve.uniform import uniform_targets
from compresso.stage import Effects, Knobs, Passes, Removes, stage


@stage(
    "magnitude_structured",
    title="removes the units with the smallest weights, the same share in every layer",
    paper="2305.11627",
    effects=Effects.SHAPES,
    when="A sanity check without any data. Not for use: every data-driven method here does better.",
    failures="Small weights are not unimportant weights: quality falls early and unevenly.",
    any_task=True,
)
class MagnitudeStructured:
    """Knobs of structured magnitude pruning.

    Args:
        removes: see `Removes`; widths are equal in all layers.
    """

    removes: Annotated[Removes, Knobs(without=("layout",))] = Removes(layout="uniform")

    def __post_init__(self) -> None:
        """Refuse query heads. Raises ValueError."""
        self.removes.no_queries()

    def budget(self) -> Budget:
        """The budget these knobs describe: equal widths in all layers."""
        return self.removes.budget()

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it reads weights alone."""
        return []

    def __call__(self, job: Job) -> Job:
        """Score, keep the best of every layer, shrink."""
        axes = self.removes.among(job.arch.axes(job.model))
        counts = uniform_targets(axes, job.cost(), self.budget())
        plan = keep_best(axes, magnitude(axes, dict(job.model.named_parameters())), counts)
        return job.without(plan.masks(axes), "magnitude_structured")
