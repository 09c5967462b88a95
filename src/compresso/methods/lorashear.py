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
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from compresso.core import schedule
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel, Counted
from compresso.core.half_space import keep_after
from compresso.core.hard_concrete import removal_order
from compresso.core.lora_score import Criterion, unit_products
from compresso.core.plan import Plan
from compresso.edit.lora import attach_, merge_
from compresso.edit.recompute import recompute_
from compresso.errors import BudgetError, NumericError, RecipeError
from compresso.job import Effects, Job, curve, stage
from compresso.observe.losses import losses_under
from compresso.solve.allocate import InfeasibleBudget, allocate
from compresso.solve.uniform import uniform_targets
from compresso.training.duration import Duration, shortened, updates
from compresso.training.fit import fit
from compresso.training.groups import Group
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
)
class LoraShear:
    """Knobs of LoRAShear's shrinking.

    Args:
        keep: share of `of` that stays.
        of: "blocks", "total", "macs" or "kv" (cache entries).
        kinds: what may be removed: heads, channels or both.
        unprunable: share of the axes (a layer's heads, a layer's channels) that keep their width.
        probed: share of an axis' units switched off to find that out.
        batches: calibration batches behind it.
        tune, shrink, hold: updates or epochs with LoRA alone; in which units shrink; with all of them at zero.
        periods: parts of `shrink`, each with a choice of its own; fewer where a part would be below 2 updates.
        criteria: weight of each score: magnitude, average, cosine, first, second.
        relative: scores compare within "kinds" (relative to the other heads, to the other channels) or over "all" units
            as published.
        half_space: eps of the half-space step.
        batch: examples an update; micro_batch: examples a forward pass.
        rank, alpha, targets, dropout: LoRA.
        lr, lr_schedule, clip: AdamW.
        lr_at_hidden: hidden size that `lr` is meant for; other widths scale it by (lr_at_hidden / hidden size)^0.75.
            None: as it is.
        layout: "free" or "uniform" (equal widths in all layers).
        multiple_of: kind -> multiple that kept counts are rounded to.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
        checkpointing: recompute activations in the backward pass.
        save_adapter: also keep the adapter as it was before merging, in the result's folder `adapters`.
        precision: "auto", "no" or "bf16" autocast.
        max_steps: cap on all updates together; phases shrink with it.
        save_every: updates between training checkpoints.
    """

    scores_by_adapters: ClassVar = True
    """The dry run refuses targets whose adapters cannot be read."""

    keep: Annotated[float, Gt(0), Le(1)] = 0.7
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL)
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
    batch: Count = 16
    micro_batch: Count = 16
    rank: Count = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    lr: Annotated[float, Ge(0)] = 5e-4
    lr_at_hidden: Count | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: Annotated[float, Ge(0)] | None = 1.0
    layout: Literal["free", "uniform"] = "free"
    multiple_of: Mapping[Kind, Count] | None = None
    floor: Mapping[Kind, Annotated[int, Ge(0)] | Literal["keep"]] | None = None
    checkpointing: bool = False
    save_adapter: bool = False
    precision: Literal["auto", "no", "bf16"] = "auto"
    max_steps: Count | None = None
    save_every: Count = 50

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other. Raises ValueError."""
        if not self.kinds or not set(self.kinds) <= {Kind.HEAD, Kind.CHANNEL}:
            raise ValueError(
                f"kinds={[*map(str, self.kinds)]}: only heads and channels shrink; give [head, channel] or one of them"
            )
        if self.layout == "uniform" and self.unprunable:
            raise ValueError(
                f"unprunable={self.unprunable} keeps some layers wider than layout='uniform' allows; set it to 0"
            )
        if self.criteria is not None and not any(self.criteria.values()):
            raise ValueError(f"criteria={dict(self.criteria)} score nothing; give at least one a weight above 0")

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        uniform = self.kinds if self.layout == "uniform" else ()
        return Budget(
            self.keep,
            self.of,
            self.kinds,
            uniform_over=uniform,
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

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
        return 0 if self.keep == 1 else int(self.unprunable * len(pool) + 1e-9)

    def __call__(self, job: Job) -> Job:
        """Find unprunable axes, tune and shrink, merge, remove what is zero."""
        pool, cost = removable(job.arch.axes(job.model), self.budget()), job.cost()
        if self.keep == 1:
            return job.without(
                {axis.name: torch.ones(axis.size) for axis in pool}, "lorashear", wanted_keep=1.0, updates=0
            )
        weights = {name: parameter.detach() for name, parameter in job.model.named_parameters()}
        harm = self._harm(job, pool, weights)
        spared = set(sorted(harm, key=lambda name: -harm[name])[: self.n_unprunable(pool)])
        axes = [axis for axis in pool if axis.name not in spared]
        self._check(pool, axes, cost)
        tune, shrink, hold = shortened(
            [updates(one, len(job.rows), self.batch) for one in (self.tune, self.shrink, self.hold)], self.max_steps
        )
        if shrink < 2:
            raise RecipeError(
                f"stage 'lorashear': {shrink} updates are left to shrink in, at least 2 are needed; raise shrink or"
                " max_steps"
            )
        periods = min(self.periods, shrink // 2)

        def choose(period: int, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Masks at the end of a period."""
            return allocate(
                axes, scores, cost, replace(self.budget(), keep=keep_after(self.keep, period, periods)), gone
            ).masks(axes)

        lora = attach_(job.model, self.rank, self.alpha, self.targets, self.dropout, job.seed)
        if self.checkpointing:
            recompute_(job.model, on=True)
        objective = ShrinkingObjective(
            lora,
            axes,
            weights,
            choose,
            starts=tune,
            length=shrink // periods,
            periods=periods,
            eps=self.half_space,
            criteria=self.criteria or _CRITERIA,
            within_kinds=self.relative == "kinds",
        ).to(job.device)
        total, lr = (
            tune + shrink + hold,
            schedule.rate_for_width(self.lr, self.lr_at_hidden, job.model.config.hidden_size),
        )
        adapters = [parameter for parameter in lora.parameters() if parameter.requires_grad]
        with objective.attached():
            history = fit(
                objective,
                [Group("lora", adapters, lr, schedule.rate(self.lr_schedule, total), clip=self.clip)],
                job.batches(self.batch, "lorashear"),
                total,
                seed=job.seed,
                accumulation=job.accumulation(self.batch, self.micro_batch),
                precision=self.precision,
                device=job.device,
                after_update=objective.shrink_,
                checkpoints=job.checkpoints(),
                save_every=self.save_every,
                progress=job.progress(),
                phase=lambda update: "tune" if update < tune else "shrink" if update < tune + shrink else "hold",
            )
            objective.shrink_(total)  # changes something only if the last update was skipped
        if self.checkpointing:
            recompute_(job.model, on=False)
        if self.save_adapter:
            job.keep_adapter(lora, "lorashear")
        facts: dict[str, Any] = {
            "updates": {"tune": tune, "shrink": shrink, "hold": hold},
            "periods": periods,
            "trainable": sum(parameter.numel() for parameter in adapters),
            "wanted_keep": self.keep,
            "lr": lr,
            "unprunable": sorted(spared),
            "loss_when_probed": {name: round(loss, 6) for name, loss in harm.items()},
            "curve": curve(history),
        }
        return replace(job, model=merge_(lora)).without(objective.masks(), "lorashear", **facts)

    def _harm(self, job: Job, pool: Sequence[Axis], weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss with the smallest units of each axis switched off: axis name -> nats a token; empty if no axis is to
        be unprunable.
        """
        if not self.n_unprunable(pool):
            return {}
        source = job.batches(self.batch, "lorashear")
        parts = [
            range(start, min(start + self.micro_batch, self.batch)) for start in range(0, self.batch, self.micro_batch)
        ]
        batches = [source.at(update, part) for update in range(self.batches) for part in parts]
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
                f"stage 'lorashear': {error}; unprunable={self.unprunable} keeps {n} of {len(pool)} axes whole: lower"
                " it or raise keep"
            ) from error


def _weight_of(axis: Axis, cost: CostModel) -> float:
    """How many block parameters an axis carries."""
    return float(cost().blocks - cost({axis.name: torch.zeros(axis.size)}).blocks)
