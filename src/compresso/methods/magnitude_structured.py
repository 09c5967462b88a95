"""Structured magnitude pruning: each layer loses the same share of its smallest units.

The L2 norm of a unit's own weights, as the weight-only baseline of LLM-Pruner (arXiv 2305.11627, section 3.2, "L2").
Every layer keeps the same number of units of a kind, because magnitudes of different layers and kinds do not compare.
Needs no data.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from compresso.core.axis import Kind
from compresso.core.budget import Budget
from compresso.core.cost import Counted
from compresso.core.score import magnitude
from compresso.job import Effects, Job, stage
from compresso.solve.allocate import keep_best
from compresso.solve.uniform import uniform_targets


@stage(
    "magnitude_structured",
    title="removes the units with the smallest weights, the same share in every layer",
    paper="2305.11627",
    effects=Effects.SHAPES,
    when="A sanity check without any data. Not for use: every data-driven method here does better.",
    failures="Small weights are not unimportant weights: quality falls early and unevenly.",
)
class MagnitudeStructured:
    """Knobs of structured magnitude pruning.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what may be removed.
        multiple_of: kind -> multiple that kept counts are rounded to.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL)
    multiple_of: Mapping[Kind, Annotated[int, Ge(1)]] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None

    def budget(self) -> Budget:
        """The budget these knobs describe: equal widths in all layers."""
        return Budget(
            self.keep,
            self.of,
            self.kinds,
            uniform_over=self.kinds,
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

    def __call__(self, job: Job) -> Job:
        """Score, keep the best of every layer, shrink."""
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind in self.kinds]
        counts = uniform_targets(axes, job.cost(), self.budget())
        plan = keep_best(axes, magnitude(axes, dict(job.model.named_parameters())), counts)
        return job.without(plan.masks(axes), "magnitude_structured")
