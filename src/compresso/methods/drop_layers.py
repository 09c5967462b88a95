"""Depth pruning: whole layers, or attention or MLP sub-layers, leave; what is left runs as it did.

    influence   ShortGPT (Men et al., arXiv 2403.03853, section 3): block influence 1 - cos of the stream before and
                after, the mean over all tokens; the least influential go, wherever they lie
    angular     Gromov et al. (arXiv 2403.17887, section 3.2): the contiguous run of n layers whose input and output
                differ by the smallest angle at an example's last token
    perplexity  Minitron (arXiv 2407.14679, section 2.2): the loss after each has been left out alone, or, iterative,
                one after another with those chosen before already left out
    reverse     the last first, a baseline
    random      a baseline

Layer Drop of mixtures of experts (arXiv 2406.02500, section 3) is influence with kinds [mlp] and `mixtures`: the
similarity cos(u, u + MoE(norm(u))), u the stream in front of the norm; the most similar mixtures leave with that norm,
attentions stay, and no dense FFN is among the candidates.

Departures: the stream is read before the final norm (ShortGPT's public code takes the last of transformers'
`hidden_states`, which lies behind it), padding counts nowhere, a token whose state is zero has no direction and is left
out. Calibration is a shuffled part of the training data instead of PG19 (ShortGPT). ShortGPT drops round(share x
layers) layers; here, as everywhere, the result is never above its budget, or `drop` says how many. ShortGPT scores
layers only: sub-layers get the same score on the stream around them, attention and MLP in one pool if both are named.
Of equal scores the lowest index goes first. Loss instead of perplexity: it ranks the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, removable
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.quantities import Budgeted, Counted
from compresso.job import Job
from compresso.observe.influence import angular_distances, block_influence
from compresso.observe.losses import losses_without
from compresso.solve.allocate import allocate
from compresso.solve.depth import Part, drop_lowest, drop_run, parts_of, without
from compresso.stage import Calibrates, Effects, Passes, stage
from compresso.training.noise import mixed_seed


@stage(
    "drop_layers",
    title="drops whole layers, attentions or MLPs: those that change the residual stream, or the loss, least",
    paper="2403.03853",
    effects=Effects.SHAPES,
    needs=("data",),
    when=(
        "For speed: decoding time and cache fall with every layer that leaves; up to about a quarter of the layers,"
        " recovery after it."
    ),
    failures=(
        "Open-ended generation breaks before multiple-choice scores fall: read the texts. Coarse: a whole layer is the"
        " unit."
    ),
)
class DropLayers:
    """Knobs of depth pruning.

    Args:
        score: "influence", "angular" (a contiguous run of layers), "perplexity", "reverse" or "random".
        kinds: what leaves: "layer" alone, or "attention", "mlp" or both.
        keep: share of `of` that stays; 0.7 if `drop` is not given either.
        of: "blocks", "total", "macs", "kv" (cache entries), "bytes_at_context" or "milliseconds"; see `Removes`.
        drop: instead of `keep`, how many layers or sub-layers leave.
        iterative: with "perplexity", score again after each removal.
        mixtures: with kinds [mlp], only mixtures of experts may leave, no dense FFN of other layers.
        calibrates: see `Calibrates`.
    """

    score: Literal["influence", "angular", "perplexity", "reverse", "random"] = "influence"
    kinds: tuple[Kind, ...] = (Kind.LAYER,)
    keep: Annotated[float, Gt(0), Le(1)] | None = None
    of: Budgeted = "blocks"
    drop: Annotated[int, Ge(1)] | None = None
    iterative: bool = False
    mixtures: bool = False
    calibrates: Calibrates = Calibrates()

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        if self.keep is not None and self.drop is not None:
            raise ValueError(f"keep={self.keep} and drop={self.drop} are two budgets; give one, and null for the other")
        if set(self.kinds) not in ({Kind.LAYER}, {Kind.ATTENTION}, {Kind.MLP}, {Kind.ATTENTION, Kind.MLP}):
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]} do not go together; give [layer], [attention], [mlp] or [attention,"
                " mlp]"
            )
        if self.score == "angular" and Kind.LAYER not in self.kinds:
            raise ValueError("score=angular measures runs of whole layers; give kinds: [layer], or score: influence")
        if self.mixtures and set(self.kinds) != {Kind.MLP}:
            raise ValueError(f"mixtures=true is about FFNs, kinds={[*map(str, self.kinds)]} are not; give kinds: [mlp]")
        if self.iterative and self.score != "perplexity":
            raise ValueError(
                f"iterative=true scores again after each removal, which score={self.score} does not; give score:"
                " perplexity"
            )

    def budget(self) -> Budget:
        """The share that these knobs describe; with `drop` everything may stay."""
        return Budget(self.keep or (0.7 if self.drop is None else 1.0), self.of, self.kinds)

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan within the budget for parts that are all alike. Raises ValueError without one, or such parts."""
        axes = self._among(axes)
        if self.score == "angular":
            return drop_run(axes[0], torch.zeros(axes[0].size + 1, axes[0].size + 1), cost, self.budget(), self.drop)
        return self._lowest(axes, {axis.name: torch.zeros(axis.size) for axis in axes}, cost)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the calibration data, or one for each part that is left out."""
        if self.score in ("reverse", "random"):
            return []
        if self.score != "perplexity":
            return [Passes("calibration", self.calibrates.examples)]
        axes = self._among(arch.axes(model))
        n, forwards = len(parts_of(axes)), len(parts_of(axes))
        if self.iterative:  # an estimate: what is measured is not known here, and whole parts cost about alike in all
            budget = self.budget() if self.of in get_args(Counted) else replace(self.budget(), of="blocks")
            alike = {axis.name: torch.zeros(axis.size) for axis in axes}
            plan = self._lowest(axes, alike, CostModel(arch.axes(model), arch.weights(model)), budget)
            leave = sum(axis.size - len(plan.kept.get(axis.name, range(axis.size))) for axis in axes)
            forwards = sum(n - i for i in range(leave))
        return [Passes("search", self.calibrates.examples, forwards=forwards)]

    def __call__(self, job: Job) -> Job:
        """Score, choose, shrink."""
        axes, cost = self._among(job.arch.axes(job.model)), job.cost()
        blocks = job.arch.blocks(job.model)
        same = {} if self.score in ("reverse", "random") else job.same("drop_layers", self)
        if self.score == "angular":
            how = job.observing("distances", same)
            distances = angular_distances(job.model, blocks, self._calibration(job), how)
            plan = drop_run(axes[0], distances, cost, self.budget(), self.drop)
            return job.without(plan.masks(axes), "drop_layers", distances=distances.tolist())
        if self.score == "influence":
            how = job.observing("scores", same)
            found = block_influence(
                job.model, blocks, job.arch.axes(job.model), self.kinds, self._calibration(job), how
            )
            scores, facts = (
                found.scores,
                {"calibration_tokens": found.tokens, "states_without_direction": found.left_out},
            )
        else:
            scores, facts = (
                self._losses(job, axes, cost, same) if self.score == "perplexity" else self._baseline(axes, job.seed),
                {},
            )
        plan = self._lowest(axes, scores, cost)
        return job.without(
            plan.masks(axes), "drop_layers", **facts, scores={name: score.tolist() for name, score in scores.items()}
        )

    def _among(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes whose parts may leave, without those that may not. Raises ValueError without any."""
        found = removable(axes, self.budget())
        if not self.mixtures:
            return found
        layers = {axis.layer for axis in axes if axis.kind == Kind.EXPERT}
        if not layers:
            raise ValueError("mixtures=true: no layer of the model has a mixture of experts; leave mixtures out")
        return [
            replace(
                axis,
                slices=tuple(piece for piece in axis.slices if piece.unit in layers),
                gates=tuple(gate for gate in axis.gates if gate.unit in layers),
            )
            for axis in found
        ]

    def _calibration(self, job: Job) -> Iterator[dict[str, Tensor]]:
        """Examples to score on."""
        return self.calibrates.read(job.batches(self.calibrates.batch, "drop_layers"))

    def _losses(self, job: Job, axes: Sequence[Axis], cost: CostModel, same: Mapping[str, Any]) -> dict[str, Tensor]:
        """Axis name -> [size]: the loss without each part; iterative: the turn it left in, and one more for those that
        stay.
        """
        batches, left, gone = list(self._calibration(job)), parts_of(axes), list[Part]()
        scores = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}

        def losses() -> Tensor:
            """Without each of those left, journalled."""
            turn = f"losses-{len(gone)}"
            journal, progress, loss = job.rounds(turn, same), job.progress(), job.task.loss
            return losses_without(
                job.model, axes, left, batches, gone, loss=loss, journal=journal, progress=progress, name=turn
            )

        if not self.iterative:
            for (name, unit), loss in zip(left, losses().tolist(), strict=True):
                scores[name][unit] = loss
            return scores
        while len(left) > 1 and not self._enough(axes, gone, cost):
            gone.append(left.pop(int(losses().argmin())))
        for name, unit in left:
            scores[name][unit] = len(gone)
        for turn, (name, unit) in enumerate(gone):
            scores[name][unit] = turn
        return scores

    def _enough(self, axes: Sequence[Axis], gone: Sequence[Part], cost: CostModel) -> bool:
        """Whether as much has left as the budget, or `drop`, asks for."""
        if self.drop is not None:
            return len(gone) >= self.drop
        return float(cost.of(without(axes, gone)).count(self.of)) <= self.budget().limit(cost)

    def _baseline(self, axes: Sequence[Axis], seed: int) -> dict[str, Tensor]:
        """Axis name -> [size]: lower for later parts, or drawn at random."""
        if self.score == "reverse":
            return {axis.name: -torch.arange(axis.size, dtype=torch.float64) for axis in axes}
        generator = torch.Generator().manual_seed(mixed_seed("drop_layers", seed))
        return {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}

    def _lowest(
        self, axes: Sequence[Axis], scores: Mapping[str, Tensor], cost: CostModel, budget: Budget | None = None
    ) -> Plan:
        """The plan without the parts of the lowest scores: `drop` of them, or those that a budget, by default the
        stage's own, asks for.
        """
        there = set(parts_of(axes))
        if self.drop is not None:
            if self.mixtures and self.drop > len(there):
                raise InfeasibleBudget(
                    f"drop={self.drop}: the model has {len(there)} mixtures of experts; lower drop to {len(there)}"
                )
            return drop_lowest(axes, scores, self.drop)
        if self.mixtures:  # what may not leave comes last
            last = {
                axis.name: torch.tensor([(axis.name, unit) not in there for unit in range(axis.size)]) for axis in axes
            }
            most = max(float(scores[axis.name].max()) for axis in axes)
            scores = {axis.name: scores[axis.name].masked_fill(last[axis.name], most + 1) for axis in axes}
        plan = allocate(axes, scores, cost, budget or self.budget())
        leave = {(axis.name, unit) for axis in axes for unit in set(range(axis.size)) - set(plan.kept[axis.name])}
        if self.mixtures and not leave <= there:
            raise InfeasibleBudget(
                f"keep={self.keep:g} of {self.of} asks for more than all {len(there)} mixtures of experts; raise keep,"
                " or leave mixtures out"
            )
        return plan
