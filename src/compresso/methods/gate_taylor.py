"""Gate-Taylor: one-shot removal of the units whose gates the loss minds least, all kinds and layers in one pool.

The squared gradient of each example's loss with respect to a unit's gate at 1 (the gates' diagonal Fisher information;
Michel et al., arXiv 1905.10650, use its absolute first-order form), divided by the unit's parameters. The strong
one-shot baseline that every learned method here is measured against; also the starting point of Compresso's gates under
`start: score`.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from compresso.core.axis import Kind
from compresso.core.budget import Budget
from compresso.core.cost import Counted
from compresso.job import Effects, Job, stage
from compresso.observe.gate_taylor import sensitivity_per_parameter
from compresso.solve.allocation import Allocation, allocated


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
)
class GateTaylor:
    """Knobs of gate-Taylor removal.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what may be removed.
        batches, batch, micro_batch: calibration batches, their examples, and examples a forward pass.
        layout: "free" or "uniform" (equal widths in all layers).
        allocation: "global" (one pool), "per_layer" (equal shares), "sensitivity" (shares by score) or "exact" (integer
            programming).
        multiple_of: kind -> multiple that kept counts are rounded to.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL)
    batches: Annotated[int, Ge(1)] = 16
    batch: Annotated[int, Ge(1)] = 16
    micro_batch: Annotated[int, Ge(1)] = 4
    layout: Literal["free", "uniform"] = "free"
    allocation: Allocation = "global"
    multiple_of: Mapping[Kind, Annotated[int, Ge(1)]] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return Budget(
            self.keep,
            self.of,
            self.kinds,
            uniform_over=self.kinds if self.layout == "uniform" else (),
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

    def __call__(self, job: Job) -> Job:
        """Score on calibration batches, allocate, shrink."""
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind in self.kinds]
        cost = job.cost()
        source = job.batches(self.batch, "gate_taylor")
        parts = [
            range(start, min(start + self.micro_batch, self.batch)) for start in range(0, self.batch, self.micro_batch)
        ]
        batches = [source.at(update, part) for update in range(self.batches) for part in parts]
        how = job.observing("scores", job.same("gate_taylor", self))
        scores = sensitivity_per_parameter(job.model, axes, cost, batches, how)
        plan = allocated(self.allocation, axes, scores, cost, self.budget())
        return job.without(plan.masks(axes), "gate_taylor", calibration_examples=self.batches * self.batch)
