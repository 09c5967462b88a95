"""LoRAShear: units shrink to exactly zero while LoRA tunes, then leave (Chen et al., arXiv 2310.18356).

The authors' code was never released. Public are the paper's steps and, in the authors' library only-train-once,
importance functions for LoRA-adapted groups and HESSO, an optimizer that drives groups to zero. In the paper's order:

    groups      A unit is a head group or an FFN channel of the adapted model: its entries of W with its rows of B and
                columns of A. The axes say which.
    knowledge   In each layer's heads or channels the units of smallest magnitude are switched off for a moment; where
                that hurts most, a share of these axes becomes unprunable and keeps its width.
    shrinking   P periods; each chooses the lowest scores (`core/lora_score.py`, as in only-train-once) and multiplies
                those units to zero while AdamW tunes the adapters of all (`core/half_space.py`, HESSO's schedule).
    removal     What is zero leaves. Recovery in two stages is the stage `recover_knowledge`.

Our choices, none of them the authors', whose own are not public: HESSO's schedule stands for LHSPG. The half-space
    step, which HESSO dropped, is tested on W + B A with `half_space` (eps); at 0 it rarely acts, since W does not move.
    What leaves is set by a budget and not by a share of groups: period p of P ends at the allocation to 1 - (1 - keep)
    p / P of the dense count, without what left before. So heads and channels land on one target, and floors, multiples
    and equal widths hold. A unit is scaled by one number where its axis has gates (heads before o_proj, channels at
    gate_proj and up_proj) instead of in each of its tensors; at zero both are the same function. The frozen W stays as
    read, so training checkpoints hold the numbers alone. Knowledge: the share of units that is switched off (`probed`),
    harm as the loss on `batches` training batches, and the share `unprunable`, rounded down to whole axes. Equal
    weights of the five criteria are only-train-once's default; `relative` says over which units they are normalised.
    Over all of them no head leaves before nearly all channels, since it has many more entries. Rates, lengths, periods,
    rank and clip are ours. Under `layout: uniform` no axis can keep its width while others lose units, so it goes with
    `unprunable: 0` only. keep = 1 trains nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel
from compresso.core.counted import counted
from compresso.core.half_space import keep_after
from compresso.core.hard_concrete import removal_order
from compresso.core.lora_score import Criterion, unit_products
from compresso.core.plan import Plan
from compresso.errors import BudgetError, NumericError, RecipeError
from compresso.job import Job
from compresso.observe.losses import losses_under
from compresso.solve.allocate import InfeasibleBudget, allocate
from compresso.solve.uniform import uniform_targets
from compresso.stage import AdamW, Calibrates, Effects, Knobs, Learning, Passes, Removes, Trains, TunesLora, stage
from compresso.stage.tuning import attached, group_of, merged, tune
from compresso.training.duration import Duration
from compresso.training.history import curve
from compresso.training.shrinking import ShrinkingObjective

Count = Annotated[int, Ge(1)]
_CRITERIA: Mapping[Criterion, float] = {"magnitude": 0.2, "average": 0.2, "cosine": 0.2, "first": 0.2, "second": 0.2}


@stage(
    "lorashear",
    title="shrinks redundant heads and FFN units to exactly zero while LoRA tunes, then removes them",
    paper="2310.18356",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "You can afford LoRA training and want survivors to learn while others fade; published at 20 and 50 % of"
        " LLaMA-7B."
    ),
    failures=(
        "Scores read mostly magnitudes while adapters are small: tune first. Short periods jump instead of fading."
    ),
    any_task=True,
    once="its units fade as it trains already, in as many `periods` as it is given",
)
class LoraShear:
    """Knobs of LoRAShear's shrinking.

    Args:
        removes: see `Removes`; heads, channels or both may leave.
        unprunable: share of the axes (a layer's heads, a layer's channels) that keep their width.
        probed: share of an axis' units switched off to find that out.
        batches: calibration batches behind it.
        tune, shrink, hold: updates or epochs with LoRA alone; in which units shrink; with all of them at zero.
        periods: parts of `shrink`, each with a choice of its own; fewer where a part would be below 2 updates.
        criteria: weight of each score: magnitude, average, cosine, first, second.
        relative: scores compare within "kinds" (relative to the other heads, to the other channels) or over "all" units
            as published.
        half_space: eps of the half-space step.
        trains, lora, adamw: see `Trains`, `TunesLora` and `AdamW`.
    """

    removes: Removes = Removes()
    unprunable: Annotated[float, Ge(0), Lt(1)] = 0.1
    probed: Annotated[float, Gt(0), Le(1)] = 0.5
    batches: Count = 4
    tune: Duration = 50
    shrink: Duration = 400
    hold: Duration = 0
    periods: Count = 10
    criteria: Mapping[Criterion, Annotated[float, Ge(0)]] | None = None
    relative: Literal["kinds", "all"] = "kinds"
    half_space: Annotated[float, Ge(0), Lt(1)] = 0.0
    trains: Annotated[Trains, Knobs(without=("steps",))] = Trains()
    lora: TunesLora = TunesLora()
    adamw: Annotated[AdamW, Knobs(without=("warmup",))] = AdamW(lr_schedule="constant")

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        self.removes.only(Kind.HEAD, Kind.CHANNEL, what="shrink")
        if self.removes.layout == "uniform" and self.unprunable:
            raise ValueError(
                f"unprunable={self.unprunable} keeps some layers wider than layout='uniform' allows; set it to 0"
            )
        if self.criteria is not None and not any(self.criteria.values()):
            raise ValueError(f"criteria={dict(self.criteria)} score nothing; give at least one a weight above 0")

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan for units that are all alike, if the smallest axes turn out unprunable.

        Raises ValueError or BudgetError if there is none.
        """
        pool = sorted(removable(axes, self.budget()), key=lambda axis: _weight_of(axis, cost))
        left = pool[self.n_unprunable(pool) :]
        chosen = [axis for axis in axes if axis in left]
        self._check(axes, chosen, cost)
        try:
            counts = uniform_targets(chosen, cost, self.budget())
            return Plan({axis.name: tuple(range(counts[axis.kind])) for axis in chosen})
        except InfeasibleBudget:
            return allocate(chosen, {axis.name: torch.zeros(axis.size) for axis in chosen}, cost, self.budget())

    def n_unprunable(self, pool: Sequence[Axis]) -> int:
        """How many of the axes keep their width."""
        return 0 if self.removes.keep == 1 else int(self.unprunable * len(pool) + 1e-9)

    def learning(self) -> Learning:
        """Adapters, which score the units."""
        return Learning(self.trains, [self.tune, self.shrink, self.hold], self.lora, by_adapters=True)

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Refuse so few updates that nothing could shrink, where they are no epochs. Raises RecipeError."""
        phases = (self.tune, self.shrink, self.hold)
        if self.removes.keep < 1 and all(isinstance(phase, int) for phase in phases):
            self._updates(1)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """A pass over the calibration data for each axis that may turn out unprunable, then the training."""
        pool = removable(arch.axes(model), self.budget())
        probed = len(pool) if self.n_unprunable(pool) else 0
        examples = self.batches * self.trains.batch
        return [Passes("calibration", examples, forwards=probed), *self.learning().passes()]

    def __call__(self, job: Job) -> Job:
        """Find unprunable axes, tune and shrink, merge, remove what is zero."""
        pool, cost = removable(job.arch.axes(job.model), self.budget()), job.cost()
        if self.removes.keep == 1:
            return job.without(
                {axis.name: torch.ones(axis.size) for axis in pool}, "lorashear", wanted_keep=1.0, updates=0
            )
        weights = {name: parameter.detach() for name, parameter in job.model.named_parameters()}
        harm = self._harm(job, pool, weights)
        spared = set(sorted(harm, key=lambda name: -harm[name])[: self.n_unprunable(pool)])
        axes = [axis for axis in pool if axis.name not in spared]
        self._check(pool, axes, cost)
        open_, shrink, hold = self._updates(len(job.rows))
        periods = min(self.periods, shrink // 2)

        def choose(period: int, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Masks at the end of a period."""
            budget = replace(self.budget(), keep=keep_after(self.removes.keep, period, periods))
            return allocate(axes, scores, cost, budget, gone).masks(axes)

        lora = attached(job, self.lora)
        objective = ShrinkingObjective(
            lora,
            axes,
            weights,
            choose,
            loss=job.task.loss,
            starts=open_,
            length=shrink // periods,
            periods=periods,
            eps=self.half_space,
            criteria=self.criteria or _CRITERIA,
            within_kinds=self.relative == "kinds",
        ).to(job.device)
        total = open_ + shrink + hold
        adapters = group_of("lora", lora, self.adamw, job.model.config.hidden_size, total)
        with objective.attached():
            history = tune(
                job,
                "lorashear",
                self.trains,
                objective,
                [adapters],
                total,
                after_update=objective.shrink_,
                phase=lambda update: "tune" if update < open_ else "shrink" if update < open_ + shrink else "hold",
            )
            objective.shrink_(total)  # changes something only if the last update was skipped
        facts: dict[str, Any] = {
            "updates": {"tune": open_, "shrink": shrink, "hold": hold},
            "periods": periods,
            "trainable": adapters.numbers,
            "wanted_keep": self.removes.keep,
            "lr": adapters.lr,
            "unprunable": sorted(spared),
            "loss_when_probed": {name: round(loss, 6) for name, loss in harm.items()},
            "curve": curve(history),
        }
        return merged(job, lora, "lorashear", self.trains).without(objective.masks(), "lorashear", **facts)

    def _updates(self, examples: int) -> list[int]:
        """Updates of the three phases on so many examples. Raises RecipeError if none could shrink anything."""
        found = self.trains.updates(examples, (self.tune, self.shrink, self.hold))
        if found[1] < 2:
            raise RecipeError(
                f"stage 'lorashear': {counted(found[1], 'update', 'is')} left to shrink in, at least 2 are needed;"
                " raise shrink or max_steps"
            )
        return found

    def _harm(self, job: Job, pool: Sequence[Axis], weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss with the smallest units of each axis switched off: axis name -> nats a token; empty if no axis is to
        be unprunable.
        """
        if not self.n_unprunable(pool):
            return {}
        looks = Calibrates(self.batches, self.trains.batch, self.trains.micro_batch)
        batches = list(looks.read(job.batches(looks.batch, "lorashear")))
        masks: list[dict[str, Tensor]] = []
        for axis in pool:
            order = removal_order(unit_products(axis, weights.get, weights.get))
            mask = torch.ones(axis.size)
            mask[order[: max(1, round(self.probed * axis.size))]] = 0
            masks.append({axis.name: mask})
        losses = losses_under(
            job.model,
            pool,
            masks,
            batches,
            loss=job.task.loss,
            journal=job.rounds("probes", job.same("lorashear", self)),
            progress=job.progress(),
            name="probe",
        )
        harm = dict(zip([axis.name for axis in pool], losses.tolist(), strict=True))
        if broken := [name for name, loss in harm.items() if not math.isfinite(loss)]:
            raise NumericError(
                f"the loss without the smallest units of {broken[0]} is not finite; use float32 or bfloat16"
            )
        return harm

    def _check(self, axes: Sequence[Axis], chosen: Sequence[Axis], cost: CostModel) -> None:
        """Raise BudgetError where only the unprunable axes stand in the way, InfeasibleBudget where the budget fails
        without them too.
        """
        pool = removable(axes, self.budget())
        try:
            allocate(chosen, {axis.name: torch.zeros(axis.size) for axis in chosen}, cost, self.budget())
        except InfeasibleBudget as error:
            allocate(pool, {axis.name: torch.zeros(axis.size) for axis in pool}, cost, self.budget())
            n = len(pool) - len(chosen)
            raise BudgetError(
                f"stage 'lorashear': {error.uncured or error}; unprunable={self.unprunable} keeps {n} of"
                f" {len(pool)} axes whole: lower it or raise keep"
            ) from error


def _weight_of(axis: Axis, cost: CostModel) -> float:
    """How many block parameters an axis carries."""
    return float(cost().blocks - cost({axis.name: torch.zeros(axis.size)}).blocks)
