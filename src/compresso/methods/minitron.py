"""Minitron: one ranking of all units by their activations, equal widths in every layer, then distillation (arXiv
2407.14679).

FFN units, heads with their key/value head, hidden dimensions and layers are ranked once, on the dense model, from
forward passes alone (section 2.2); the best of each axis stay, the same number in every layer (section 2.3). The stage
`distill` comes after it (section 3).

Departures. How many units of each kind stay follows from one budget, near one share for all kinds, instead of from a
hand-written architecture; with `candidates` several such shapes are tried and the one with the lowest loss on
calibration data is taken, without the paper's light retraining (section 2.4). Query heads leave only together with
their key/value head. Norms are corrected for their smaller width, so that dimensions that are always zero leave without
a trace; the published code leaves that to distillation. Heads are not merged into their neighbours. Layers are scored
by block influence, not by perplexity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.observe.activations import Aggregate, activation_scores
from compresso.observe.losses import losses_under
from compresso.solve.allocate import keep_best
from compresso.solve.shapes import candidate_shapes
from compresso.stage import Calibrates, Effects, Knobs, Passes, Removes, stage
from compresso.training.rounds import RoundJournal


@stage(
    "minitron",
    title="keeps the units with the largest activations, equal widths in every layer",
    paper="2407.14679",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data",),
    when=(
        "Before distillation on much data, where a plain architecture must come out: hidden size, FFN width, heads and"
        " layers."
    ),
    failures=(
        "Activations are not importance: without distillation the loss is far up. Removing layers hurts generation"
        " most."
    ),
)
class Minitron:
    """Knobs of Minitron's pruning.

    Args:
        removes: see `Removes`; widths are equal in all layers. Of head, channel, hidden and layer, the paper's width
            pruning leaves heads and layers alone, and it takes a multiple of 64 for the others.
        calibrates: see `Calibrates`.
        candidates: shapes on the budget that are tried; 1 takes the one with the same share of every kind.
        candidate_batches: batches that a candidate's loss is taken on.
        over_tokens, over_examples: how activations are aggregated: "mean" (of absolute values), "l2" or "variance".
    """

    removes: Annotated[Removes, Knobs(without=("layout",))] = Removes(
        kinds=(Kind.CHANNEL, Kind.HIDDEN), layout="uniform"
    )
    calibrates: Annotated[Calibrates, Knobs(after="floor")] = Calibrates(batches=64)
    candidates: Annotated[int, Ge(1)] = 1
    candidate_batches: Annotated[int, Ge(1)] = 8
    over_tokens: Aggregate = "mean"
    over_examples: Aggregate = "l2"

    def __post_init__(self) -> None:
        """Refuse kinds that no activation ranks. Raises ValueError."""
        self.removes.only(Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER, what="are ranked")

    def budget(self) -> Budget:
        """The budget these knobs describe: equal widths in all layers."""
        return self.removes.budget()

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the calibration data, and one for each shape that is tried."""
        looks = [Passes("calibration", self.calibrates.examples)]
        tried = Passes("search", self.candidate_batches * self.calibrates.batch, forwards=self.candidates)
        return [*looks, tried] if self.candidates > 1 else looks

    def __call__(self, job: Job) -> Job:
        """Score, keep the best of every axis, shrink."""
        axes = self.removes.among(job.arch.axes(job.model))
        blocks = list(job.arch.blocks(job.model))
        same = job.same("minitron", self)
        scores = activation_scores(
            job.model,
            axes,
            blocks,
            self._batches(job),
            self.over_tokens,
            self.over_examples,
            job.observing("scores", same),
        )
        shapes = candidate_shapes(axes, job.cost(), self.budget(), self.candidates)
        plans = [keep_best(axes, scores, counts) for counts in shapes]
        losses = self._losses(job, axes, plans, job.rounds("candidates", same)) if len(plans) > 1 else [0.0]
        best = losses.index(min(losses))
        facts: dict[str, object] = {"calibration_examples": self.calibrates.among(len(job.rows))}
        if len(plans) > 1:
            tried = [{str(kind): n for kind, n in counts.items()} for counts in shapes]
            facts["candidates"] = [
                {"kept": counts, "loss": round(loss, 6)} for counts, loss in zip(tried, losses, strict=True)
            ]
        return job.without(plans[best].masks(axes), "minitron", **facts)

    def _batches(self, job: Job, n: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The calibration batches, or the first n of them."""
        calibrates = self.calibrates if n is None else replace(self.calibrates, batches=n)
        return calibrates.read(job.batches(calibrates.batch, "minitron"))

    def _losses(
        self, job: Job, axes: Sequence[Axis], plans: Sequence[Plan], journal: RoundJournal | None
    ) -> list[float]:
        """Mean next-token loss of the model as each plan would leave it, the mean over batches."""
        return losses_under(
            job.model,
            axes,
            [plan.masks(axes) for plan in plans],
            list(self._batches(job, self.candidate_batches)),
            loss=job.task.loss,
            mean_over="batches",
            journal=journal,
            progress=job.progress(),
            name="candidates",
        ).tolist()
