"""Filter pruning: every layer loses the same share of its channels, those of the smallest L2 norm (Li et al., arXiv
1608.08710, who take L1; L2 as the code of arXiv 2309.02617 does, for segmenters on small boards).

1. A channel's norm is taken over all that leaves with it: row of the convolution, batch norm, what reads it.
2. Each layer keeps round(keep x channels) of them, the largest.
3. They leave for good: tensors are smaller.

Departures. The published code takes the norm of the row alone, masks convolutions one by one, depthwise ones and
channels that a residual sum adds among them, and computes what is masked; here channels that belong together leave
together, feature maps that a sum adds stay whole unless `kinds` names hidden, and the last convolution before a
classifier is in nothing that a segmenter runs. Channels of convolutions are rounded to a multiple of 8, as MobileNets'
are (never by more than a tenth down), since their configs say no other; units of an FFN are rounded down. Needs no
data.
"""

import logging
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.counted import counted
from compresso.core.plan import Plan
from compresso.core.score import magnitude
from compresso.job import Job
from compresso.stage import Effects, Passes, stage

log = logging.getLogger(__name__)

_FAR = 0.1
"""From the share that was asked for; a layer that keeps a share so far from it is told."""


@stage(
    "filter_pruning",
    title="removes the same share of each layer's channels, those of the smallest weights",
    paper="1608.08710",
    effects=Effects.SHAPES,
    when="For networks of stages whose config has one ratio for all of them, such as MobileViT.",
    failures="Small weights are not unimportant weights; MobileViT loses accuracy early. Distil behind it.",
    any_task=True,
    once="its share is one of each layer's channels, and budgets count none",
)
class FilterPruning:
    """Knobs of filter pruning.

    Args:
        keep: share of each layer's units that stays; not a share of parameters.
        kinds: what may be removed: "channel", and "hidden" (feature maps of a stage).
        rounded_to: multiple that channels of convolutions are rounded to.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.5
    kinds: tuple[Kind, ...] = (Kind.CHANNEL,)
    rounded_to: Annotated[int, Ge(1)] = 8

    def __post_init__(self) -> None:
        """Refuse other kinds. Raises ValueError."""
        if other := [kind.value for kind in self.kinds if kind not in (Kind.CHANNEL, Kind.HIDDEN)]:
            raise ValueError(f"kinds names {other[0]}, which is no channel; give [channel], or [channel, hidden]")

    def budget(self) -> Budget | None:
        """None: the share is of units, layer by layer."""
        return None

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """As many units as stay; which is decided by weights. Raises ValueError where there are no such units."""
        return Plan({axis.name: tuple(range(self._stay(axis, cost))) for axis in self._among(axes)})

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """How many channels stay, with what share of the parameters; and where rounding leaves another share than was
        asked for.
        """
        axes = arch.axes(model)
        cost = CostModel(axes, arch.weights(model))
        among, plan = self._among(axes), self.dry_run_plan(axes, cost)
        kept, there = sum(len(units) for units in plan.kept.values()), sum(axis.size for axis in among)
        parameters = float(cost.of(plan).total / cost().total)
        said = f"{kept:,} of {there:,} channels stay ({kept / there:.1%}), and with them {parameters:.1%} of parameters"
        said += "" if Kind.HIDDEN in self.kinds else ": feature maps between layers are not among them"
        off = [axis for axis in among if abs(len(plan.kept[axis.name]) / axis.size - self.keep) > _FAR]
        if off:
            worst = max(off, key=lambda axis: abs(len(plan.kept[axis.name]) / axis.size - self.keep))
            said += (
                f"; rounded to multiples of {self.rounded_to}, {len(off)} of {counted(len(among), 'layer')} keep a"
                f" share that is more than {_FAR:g} from {self.keep:g}, such as {worst.name}"
                f" {len(plan.kept[worst.name])} of {worst.size}"
            )
        return [said]

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it reads weights alone."""
        return []

    def __call__(self, job: Job) -> Job:
        """Score, keep the largest of every layer, shrink."""
        if not job.quiet:
            log.warning("filter_pruning: %s", "; ".join(self.remarks(job.model, job.arch)))
        axes, cost = self._among(job.arch.axes(job.model)), job.cost()
        scores = magnitude(axes, dict(job.model.named_parameters()))
        masks = {
            axis.name: torch.zeros(axis.size).index_fill(0, scores[axis.name].cpu().topk(self._stay(axis, cost))[1], 1)
            for axis in axes
        }
        return job.without(masks, "filter_pruning")

    def _among(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes that lose units. Raises ValueError if there are none."""
        found = [axis for axis in axes if axis.kind in self.kinds and axis.size]
        if not found:
            raise ValueError(f"kinds={[kind.value for kind in self.kinds]} name nothing that this model has")
        return found

    def _stay(self, axis: Axis, cost: CostModel) -> int:
        """How many units of an axis stay."""
        shapes = {weight.name: weight.shape for weight in cost.weights}
        convolved = any(len(shapes[piece.param]) == 4 for piece in axis.slices)
        multiple = self.rounded_to if convolved else 1
        wanted = axis.size * self.keep
        rounded = multiple * int(wanted / multiple + (0.5 if convolved else 1e-9))
        rounded += multiple if convolved and rounded < 0.9 * wanted else 0
        return min(max(rounded, multiple, axis.fewest), axis.size)
