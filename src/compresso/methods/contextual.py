"""Contextual pruning for a target size: units that a domain's text hardly activates leave for good (Mini-GPTs, arXiv
2312.12682).

The paper's measure, mean absolute activations on text of the domain, as a method that shrinks: each layer's means are
divided by their largest, all layers are ranked together, and the least used units leave until a budget is met.
`contextual_thresholds` is the published procedure, and `cut_vocab` its part about tokens.

Departures: A unit is an FFN channel with its rows and columns, or a head, instead of single rows and columns that are
    zeroed. Means are relative to their layer and a size is met, since activations grow with depth: one threshold means
    another in each. The mean output of what leaves goes into the bias of the linear that read it, where the
    architecture has one; the records say where not. Calibration examples are training examples; held-out ones of the
    same domain are never read.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.data.windows import check_window
from compresso.edit.compensate import compensate_
from compresso.job import Job
from compresso.observe.activations import activation_scores, mean_inputs, reader
from compresso.observe.observe import Pass
from compresso.solve.allocate import allocate
from compresso.stage import Calibrates, Effects, Passes, Removes, stage


@stage(
    "contextual",
    title="removes the units that the text of a domain activates least",
    paper="2312.12682",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data",),
    when="For models of one domain, with text of that domain; one pass of forward passes, no gradients.",
    failures=(
        "What other domains need is gone, and a unit that speaks rarely but matters counts as unused: measure on what"
        " must survive."
    ),
)
class Contextual:
    """Knobs of contextual pruning to a size.

    Args:
        removes: see `Removes`; channels and heads may leave.
        calibrates: see `Calibrates`.
        compensate: put the mean output of what leaves into biases, where there are any.
    """

    removes: Removes = Removes(kinds=(Kind.CHANNEL,))
    calibrates: Calibrates = Calibrates()
    compensate: bool = True

    def __post_init__(self) -> None:
        """Refuse kinds whose activations are not measured. Raises ValueError."""
        self.removes.only(Kind.CHANNEL, Kind.HEAD, what="are measured")

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def check_data(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        window: int | None,
    ) -> None:
        """Raises DataError for plain text of less than a window."""
        check_window(rows, window)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the calibration data, and another for mean outputs where a bias can take them."""
        readers = (reader(model, axis) for axis in self.removes.among(arch.axes(model)) if axis.size)
        again = self.compensate and any(module.bias is not None for module in readers)
        return [Passes("calibration", self.calibrates.examples, forwards=1 + again)]

    def __call__(self, job: Job) -> Job:
        """Read the text, rank, compensate, shrink."""
        axes = self.removes.among(job.arch.axes(job.model))
        blocks = list(job.arch.blocks(job.model))
        same = job.same("contextual", self)
        how = job.observing("scores", same)
        means = activation_scores(job.model, axes, blocks, self._batches(job), "mean", "mean", how)
        scores = {name: relative(mean) for name, mean in means.items()}
        plan = allocate(axes, scores, job.cost(), self.budget())
        facts: dict[str, object] = {"calibration_examples": self.calibrates.among(len(job.rows))}
        if self.compensate:
            facts |= self._compensate(job, axes, plan, job.observing("means", same))
        return job.without(plan.masks(axes), "contextual", **facts)

    def _compensate(self, job: Job, axes: Sequence[Axis], plan: Plan, how: Pass) -> dict[str, object]:
        """Put mean outputs into biases; of the axes that lose units, how many have one and how many do not."""
        cut = [axis for axis in axes if len(plan.kept.get(axis.name, range(axis.size))) < axis.size]
        readers = {axis.name: reader(job.model, axis) for axis in cut}
        biased = {name: module for name, module in readers.items() if getattr(module, "bias", None) is not None}
        means = mean_inputs(job.model, biased, self._batches(job), how) if biased else {}
        for name, mean in means.items():
            stays = plan.masks(cut)[name].bool()
            compensate_(biased[name], mean, ~stays.repeat_interleave(len(mean) // len(stays)))
        return {"compensated": len(biased), "without_bias": len(readers) - len(biased)}

    def _batches(self, job: Job) -> Iterator[dict[str, Tensor]]:
        """The calibration batches."""
        return self.calibrates.read(job.batches(self.calibrates.batch, "contextual"))


def relative(mean: Tensor) -> Tensor:
    """Mean activations [units] as a share of the layer's largest; a layer that is silent gets zeros."""
    return mean / mean.max().clamp(min=torch.finfo(mean.dtype).tiny)
