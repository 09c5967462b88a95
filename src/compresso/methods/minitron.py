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

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import Counted
from compresso.core.plan import Plan
from compresso.job import Effects, Job, stage
from compresso.observe.activations import Aggregate, activation_scores
from compresso.observe.losses import losses_under
from compresso.solve.allocate import keep_best
from compresso.solve.shapes import candidate_shapes
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
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what may be removed, of head, channel, hidden and layer; the paper's width pruning leaves heads and
            layers alone.
        multiple_of: kind -> multiple that kept counts are rounded to; the paper takes 64 for hidden and channel.
        floor: kind -> fewest units an axis keeps; "keep" for its share of them.
        batches, batch, micro_batch: calibration batches, their examples, and examples a forward pass.
        candidates: shapes on the budget that are tried; 1 takes the one with the same share of every kind.
        candidate_batches: batches that a candidate's loss is taken on.
        over_tokens, over_examples: how activations are aggregated: "mean" (of absolute values), "l2" or "variance".
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Counted = "blocks"
    kinds: tuple[Literal[Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER], ...] = (Kind.CHANNEL, Kind.HIDDEN)
    multiple_of: Mapping[Kind, Annotated[int, Ge(1)]] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None
    batches: Annotated[int, Ge(1)] = 64
    batch: Annotated[int, Ge(1)] = 16
    micro_batch: Annotated[int, Ge(1)] = 4
    candidates: Annotated[int, Ge(1)] = 1
    candidate_batches: Annotated[int, Ge(1)] = 8
    over_tokens: Aggregate = "mean"
    over_examples: Aggregate = "l2"

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
        """Score, keep the best of every axis, shrink."""
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind in self.kinds]
        blocks = list(job.arch.blocks(job.model))
        same = job.same("minitron", self)
        scores = activation_scores(
            job.model,
            axes,
            blocks,
            self._batches(job, self.batches),
            self.over_tokens,
            self.over_examples,
            job.observing("scores", same),
        )
        shapes = candidate_shapes(axes, job.cost(), self.budget(), self.candidates)
        plans = [keep_best(axes, scores, counts) for counts in shapes]
        losses = self._losses(job, axes, plans, job.rounds("candidates", same)) if len(plans) > 1 else [0.0]
        best = losses.index(min(losses))
        facts: dict[str, object] = {"calibration_examples": self.batches * self.batch}
        if len(plans) > 1:
            tried = [{str(kind): n for kind, n in counts.items()} for counts in shapes]
            facts["candidates"] = [
                {"kept": counts, "loss": round(loss, 6)} for counts, loss in zip(tried, losses, strict=True)
            ]
        return job.without(plans[best].masks(axes), "minitron", **facts)

    def _batches(self, job: Job, n: int) -> Iterator[dict[str, Tensor]]:
        """The first n calibration batches, `micro_batch` examples at a time."""
        source = job.batches(self.batch, "minitron")
        parts = [
            range(start, min(start + self.micro_batch, self.batch)) for start in range(0, self.batch, self.micro_batch)
        ]
        return (source.at(update, rows) for update in range(n) for rows in parts)

    def _losses(
        self, job: Job, axes: Sequence[Axis], plans: Sequence[Plan], journal: RoundJournal | None
    ) -> list[float]:
        """Mean next-token loss of the model as each plan would leave it, the mean over batches."""
        return losses_under(
            job.model,
            axes,
            [plan.masks(axes) for plan in plans],
            list(self._batches(job, self.candidate_batches)),
            mean_over="batches",
            journal=journal,
            progress=job.progress(),
            name="candidates",
        ).tolist()
