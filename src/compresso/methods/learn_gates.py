"""Compresso: structured pruning learned during instruction tuning (arXiv 2310.05015).

Removes heads (a key/value head with its query heads), FFN units and hidden dimensions. Base weights stay frozen; LoRA
adapters and one hard-concrete gate per unit learn together: loss = next-token loss + lambda1 (s - t) + lambda2 (s -
t)^2, with s the expected sparsity of the block parameters and t its target, ramped up (section 3.2). The learned masks
are folded in and the model is really made smaller.

In the published configurations (recipes compresso/paper, compresso/script) these departures remain, each for a reason:
  - expected size by the factorised sum in float64, not an fp16 outer product (5e-4 relative error);
  - all counts are updates, not micro-batches; one draw of noise an update for all micro-batches and processes, and gate
    and multiplier gradients are reduced over processes (the public code lets each process sample its own);
  - multipliers ascend explicitly; clipping covers LoRA alone, as documented there;
  - a run that ends more than 2 % of its target away from it says so (the public code removes what it has);
  - the last step lands on the target: one uniform shift of log-alpha before the deterministic rule, then single units
    (the public rule rounds per layer and misses by up to a few percent);
  - the last update's gates and adapters are taken; the public code keeps those of the best next-token accuracy on the
    test text of WikiText-2, once the expected sparsity is within .005 of its target;
  - gates of a GQA model belong to key/value heads.

The default recipe departs further, each a knob of this stage: `constraint: projection` holds the budget exactly after
every update instead of by multipliers, and `cost_aware` then charges gates for their parameters; `start: score` starts
log-alpha from scores; `noise: example` draws noise per example; `finish: hard` makes survivors exactly one
before recovery; adapters lie on all linears at a rate that `lr_at_hidden` scales with the width; `layout: uniform`
learns equal widths per layer (per-kind targets as in LLM-Shearing, arXiv 2310.06694, section 2.1).

Layers, attentions and MLPs may have gates in the same pool (CoFi, arXiv 2204.00408, has them, too): a unit counts only
while its sub-layer and its layer are open, so that the expected size is a sum of products of probabilities. The paper
has none: removing widths alone lost to dropping whole layers on small models. Their gates start from the loss without
each (`observe/pooled.py`), since their gradients are blind to depth.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.context import width_of
from compresso.core import hard_concrete, schedule
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.gates import Gates
from compresso.job import Job
from compresso.observe.gate_taylor import sensitivity_per_cost
from compresso.observe.influence import block_influence
from compresso.observe.observe import Batch
from compresso.observe.pooled import PARTS, Looks, n_losses, pooled_per_cost
from compresso.solve.allocate import allocate
from compresso.solve.constraint import CountsPerLayer, ShareOfModel
from compresso.solve.depth import absorbed
from compresso.solve.project import deterministic_to_budget, shift_to_budget
from compresso.solve.uniform import uniform_targets
from compresso.stage import AdamW, Calibrates, Effects, Knobs, Learning, Passes, Removes, Trains, TunesLora, stage
from compresso.stage.tuning import attached, group_of, merged, shards_of, tune
from compresso.training.duration import Duration
from compresso.training.groups import Group
from compresso.training.history import curve
from compresso.training.noise import mixed_seed
from compresso.training.objectives import GatedObjective

log = logging.getLogger(__name__)

FAR = 0.02
"""Share of its target by which a Lagrangian may miss it unsaid: the rest is removed at once, which nothing has learned
to bear.
"""

Count = Annotated[int, Ge(1)]
Rate = Annotated[float, Ge(0)]


@stage(
    "learn_gates",
    title="learns which heads, FFN units, hidden dimensions and layers to keep while LoRA tunes",
    paper="2310.05015",
    effects=Effects.SHAPES | Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "You have a few thousand examples and can afford LoRA training; strongest where half or more is removed. "
        "For a quick 10-20 % use gate-taylor, which needs a single pass."
    ),
    failures=(
        "Too high a gate rate freezes an early choice (expected sparsity jumps within the first updates);"
        " instruction-only data ruins plain-text perplexity: mix text in."
    ),
    any_task=True,
)
class LearnGates:
    """Knobs of Compresso's mask training.

    Args:
        removes: see `Removes`; multiples are met by keeping the highest gates.
        tune, ramp, hold: updates or epochs with LoRA alone; with the target rising; at the final target.
        ramp_shape: "linear" or "cubic".
        trains, lora, adamw: see `Trains`, `TunesLora` and `AdamW`, which is that of the adapters.
        mask_lr, mask_schedule, lambda_lr: AdamW rates of log-alpha and (ascending) of the multipliers.
        constraint: "lagrangian" as published, or "projection".
        cost_aware: under projection, charge each gate for its parameters.
        start: "open" as published, or "score".
        open_mean, channel_droprate: initial log-alpha of an open gate, and FFN gates' initial drop rate.
        score_batches, score_spread: batches behind the starting scores; spread of the starting log-alpha.
        depth_batches: of these, the first so many are behind the scores of layers, attentions and MLPs, each of which
            takes a forward pass over them.
        depth_weight: what the loss without such a part counts for beside what units cost; below 1 where training is
            thought to give back more of it.
        depth_from: fewest layers of a model of which `kinds` may take whole ones, attentions or MLPs; a shallower one
            keeps them.
        noise: "batch" (one draw an update) or "example" (one draw an example).
        layer_gates: "none", or the published option that switches pruning on per "layer" or "sublayer".
        finish: "soft" keeps survivors' mask values as published; "hard" sets them to 1.
        depth_order: whether the losses without layers, attentions and MLPs belong to the part that each was taken
            without ("loss"), or are handed out in the order of block influence ("influence").
    """

    removes: Removes = Removes(kinds=(Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN))
    tune: Duration = "1 epoch"
    ramp: Duration = "5 epochs"
    hold: Duration = "1 epoch"
    ramp_shape: Literal["linear", "cubic"] = "linear"
    trains: Annotated[Trains, Knobs(without=("steps",))] = Trains(batch=8, micro_batch=8)
    lora: TunesLora = TunesLora(alpha=8.0, targets=("q_proj", "v_proj"))
    adamw: Annotated[AdamW, Knobs(without=("warmup",))] = AdamW(lr=5e-5, lr_schedule="linear")
    mask_lr: Rate = 0.1
    mask_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lambda_lr: Rate = 0.1
    constraint: Literal["lagrangian", "projection"] = "lagrangian"
    cost_aware: bool = False
    start: Literal["open", "score"] = "open"
    open_mean: float = 10.0
    channel_droprate: Annotated[float, Gt(0), Le(0.5)] = 0.01
    score_batches: Count = 16
    score_spread: Annotated[float, Gt(0)] = 1.5
    depth_batches: Count = 1
    depth_weight: Annotated[float, Gt(0)] = 1.0
    depth_from: Count = 1
    noise: Literal["batch", "example"] = "batch"
    layer_gates: Literal["none", "layer", "sublayer"] = "none"
    finish: Literal["soft", "hard"] = "soft"
    depth_order: Literal["loss", "influence"] = "loss"

    def __post_init__(self) -> None:
        """Refuse query heads, and knobs that contradict each other. Raises ValueError."""
        self.removes.no_queries()
        if self.layer_gates != "none" and self.constraint != "lagrangian":
            raise ValueError(
                f"layer_gates={self.layer_gates!r} learn under constraint='lagrangian' only; a projection does not move"
                " them"
            )
        if self.cost_aware and self.constraint != "projection":
            raise ValueError(
                "cost_aware=True goes with constraint='projection'; a Lagrangian already charges gates for their cost"
            )

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def fitted(self, axes: Sequence[Axis]) -> "LearnGates":
        """This stage on a model with these axes: without kinds of depth, if it is a shallow one."""
        depth = [axis.size for axis in axes if axis.kind in PARTS]
        kinds = tuple(kind for kind in self.removes.kinds if kind not in PARTS)
        if not kinds or len(kinds) == len(self.removes.kinds) or max(depth, default=0) >= self.depth_from:
            return self
        fewer = replace(self.removes, kinds=kinds)
        return replace(self, removes=fewer)  # pyright: ignore[reportArgumentType]  # `stage` makes it a dataclass

    def learning(self) -> Learning:
        """Adapters and gates."""
        phases = [self.tune, self.ramp, self.hold]
        return Learning(self.trains, phases, self.lora, gates=self.removes.kinds, spreads=True)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes behind the starting scores, if there are any, and those of the training."""
        if self.start != "score":
            return self.learning().passes()
        looks = [Passes("calibration", self.score_batches * self.trains.batch, backwards=1)]
        axes = arch.axes(model)
        if forwards := n_losses(axes, self.fitted(axes).removes.kinds):
            looks.append(Passes("search", self.depth_batches * self.trains.batch, forwards=forwards))
            if self.depth_order == "influence":
                looks.append(Passes("calibration", self.score_batches * self.trains.batch, forwards=1))
        return [*looks, *self.learning().passes()]

    def __call__(self, job: Job) -> Job:
        """Train gates and LoRA together, land on the budget, merge, fold and shrink."""
        fitted = self.fitted(job.arch.axes(job.model))
        if fitted is not self:
            return fitted(job)
        removes = self.removes
        axes, cost, budget = removes.among(job.arch.axes(job.model)), job.cost(), self.budget()
        if removes.layout == "uniform":
            constraint = CountsPerLayer(axes, uniform_targets(axes, cost, budget), cost, removes.of)
        else:
            constraint = ShareOfModel(cost, removes.keep, removes.of)
        open_, ramp, hold = self.trains.updates(len(job.rows), (self.tune, self.ramp, self.hold))
        total = open_ + ramp + hold

        gates = Gates(axes, self._initial(job, axes, cost)).to(job.device)
        lora = attached(job, self.lora)
        objective = GatedObjective(
            lora,
            gates,
            constraint,
            loss=job.task.loss,
            starts=open_,
            progress=schedule.progress(self.ramp_shape, ramp),
            use_lagrangian=self.constraint == "lagrangian",
            noise=self.noise,
            seed=job.seed,
            layer_gates=self.layer_gates,
            cost_aware=self.cost_aware,
        )
        adapters = group_of("lora", lora, self.adamw, width_of(job.model.config), total)
        groups = [
            adapters,
            Group("gates", objective.gate_parameters(), self.mask_lr, schedule.rate(self.mask_schedule, total)),
        ]
        if objective.multipliers():
            groups.append(Group("multipliers", objective.multipliers(), self.lambda_lr, ascend=True))

        def after_update(update: int) -> Mapping[str, float]:
            """Clamp after every update; under projection, also shift back onto the budget."""
            if update < open_:
                return {}
            objective.clamp_()
            if self.constraint == "projection":
                objective.project_(update - open_ + 1)
            return objective.state()

        with objective.attached():
            history = tune(
                job,
                "learn_gates",
                self.trains,
                objective,
                groups,
                total,
                after_update=after_update,
                phase=lambda update: "tune" if update < open_ else "ramp" if update < open_ + ramp else "hold",
                shards=shards_of(job),
            )
        expected = 1 - constraint.sparsity(objective.keep_probabilities()).item()
        missed = self._missed(expected, 1 - constraint.target(1.0))
        masks = self._project(objective.final_values(), axes, cost, budget)
        return merged(job, lora, "learn_gates", self.trains).without(
            masks,
            "learn_gates",
            updates={"tune": open_, "ramp": ramp, "hold": hold},
            trainable={
                "lora": adapters.numbers,
                "gates": len(gates),
                "multipliers": sum(p.numel() for p in objective.multipliers()),
            },
            wanted_keep=removes.keep,
            lr=adapters.lr,
            expected_keep=expected,
            curve=curve(history),
            **missed,
        )

    def _missed(self, expected: float, wanted: float) -> dict[str, object]:
        """What the records say of a Lagrangian that ended far from its target, which is warned of, too."""
        if self.constraint != "lagrangian" or abs(expected - wanted) <= FAR * wanted:
            return {}
        said = (
            f"the gates keep {expected:.4f} of {self.removes.of} at the end of training, {wanted:.4f} were wanted: the"
            " difference is cut or put back untrained; lengthen ramp and hold, raise lambda_lr or mask_lr, or set"
            " constraint: projection"
        )
        log.warning("learn_gates: %s", said)
        return {"far_from_target": said}

    def _initial(self, job: Job, axes: Sequence[Axis], cost: CostModel) -> dict[str, Tensor]:
        """Starting log-alpha: open as published, or spread by score around the budget's threshold."""
        if self.start == "open":
            generator = torch.Generator().manual_seed(mixed_seed("log-alpha", job.seed))
            means = {axis.name: None if axis.kind == Kind.CHANNEL else self.open_mean for axis in axes}
            return {
                axis.name: hard_concrete.initial_log_alpha(
                    axis.kind, axis.size, generator, droprate=self.channel_droprate, mean=means[axis.name]
                )
                for axis in axes
            }
        scores = self._scores(job, axes, cost)
        logs = {name: score.clamp(min=1e-30).log() for name, score in scores.items()}
        pooled = torch.cat(list(logs.values()))
        spread = {
            name: (log - pooled.mean()) / pooled.std().clamp(min=1e-6) * self.score_spread for name, log in logs.items()
        }
        shift = shift_to_budget(spread, cost, self.removes.keep, self.removes.of)
        return {name: hard_concrete.clamp_(one + shift) for name, one in spread.items()}

    def _scores(self, job: Job, axes: Sequence[Axis], cost: CostModel) -> dict[str, Tensor]:
        """What a gate is worth per parameter, before anything was learned."""
        looks = Calibrates(self.score_batches, self.trains.batch, self.trains.micro_batch)
        batches = list(looks.read(job.batches(looks.batch, "gate_taylor")))
        same = job.same("learn_gates", self)
        how = job.observing("scores", same)
        if not any(axis.kind in PARTS for axis in axes):
            return sensitivity_per_cost(job.model, axes, cost, batches, how=how, loss=job.task.loss)
        first = replace(looks, batches=self.depth_batches).read(job.batches(looks.batch, "gate_taylor"))
        order = self._order(job, axes, batches, same) if self.depth_order == "influence" else None
        depth = Looks(list(first), job.rounds("depth", same), job.rounds("pools", same), job.progress(), order)
        budget = replace(self.budget(), of="blocks")  # as the scores of units are
        weight, loss = self.depth_weight, job.task.loss
        return pooled_per_cost(job.model, axes, cost, budget, batches, depth, weight=weight, how=how, loss=loss)

    def _order(
        self, job: Job, axes: Sequence[Axis], batches: Sequence[Batch], same: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """How far each part turns the stream: axis name -> [size]."""
        kinds = [axis.kind for axis in axes if axis.kind in PARTS]
        how, blocks = job.observing("influence", same), job.arch.blocks(job.model)
        return block_influence(job.model, blocks, job.arch.axes(job.model), kinds, batches, how).scores

    def _project(
        self, values: Mapping[str, Tensor], axes: Sequence[Axis], cost: CostModel, budget: Budget
    ) -> dict[str, Tensor]:
        """Masks of exactly the budget: the deterministic rule, or the highest gates where layouts or multiples are
        asked for, or whole layers leave.
        """
        values = {name: value.cpu() for name, value in values.items()}
        deep = any(axis.kind in PARTS for axis in axes)  # one that does not fit may leave the rule far below the target
        if self.finish == "soft" and self.removes.layout == "free" and not budget.rounds and not deep:
            return deterministic_to_budget(values, axes, cost, budget.keep, budget.of)
        masks = absorbed(axes, allocate(axes, values, cost, budget).masks(axes))
        if self.finish == "hard":
            return masks
        return {name: mask * hard_concrete.soft_value(values[name]) for name, mask in masks.items()}
