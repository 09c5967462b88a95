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
  - the last step lands on the target: one uniform shift of log-alpha before the deterministic rule, then single units
    (the public rule rounds per layer and misses by up to a few percent);
  - gates of a GQA model belong to key/value heads.

The default recipe departs further, each a knob of this stage: `constraint: projection` holds the budget exactly after
every update instead of by multipliers, and `cost_aware` then charges gates for their parameters; `start: score` starts
log-alpha from gate-Taylor scores; `noise: example` draws noise per example; `finish: hard` makes survivors exactly one
before recovery; adapters lie on all linears at a rate that `lr_at_hidden` scales with the width; `layout: uniform`
learns equal widths per layer (per-kind targets as in LLM-Shearing, arXiv 2310.06694, section 2.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from compresso.core import hard_concrete, schedule
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel, Counted
from compresso.core.gates import Gates
from compresso.edit.lora import attach_, merge_
from compresso.edit.recompute import recompute_
from compresso.job import Effects, Job, curve, stage
from compresso.observe.gate_taylor import sensitivity_per_parameter
from compresso.solve.allocate import allocate
from compresso.solve.constraint import CountsPerLayer, ShareOfModel
from compresso.solve.project import deterministic_to_budget, shift_to_budget
from compresso.solve.uniform import uniform_targets
from compresso.training.duration import Duration, shortened, updates
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.noise import mixed_seed
from compresso.training.objectives import GatedObjective

Share = Annotated[float, Gt(0), Le(1)]
Count = Annotated[int, Ge(1)]
Rate = Annotated[float, Ge(0)]


@stage(
    "learn_gates",
    title="learns which heads, FFN units and hidden dimensions to keep while LoRA tunes",
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
)
class LearnGates:
    """Knobs of Compresso's mask training.

    Args:
        keep: share of `of` that stays, of the model this stage receives.
        of: what is counted: "blocks" (linear layers), "total" (all parameters) or "macs" (per token).
        kinds: what may be removed.
        tune, ramp, hold: updates or epochs with LoRA alone; with the target rising; at the final target.
        ramp_shape: "linear" or "cubic".
        batch: examples an update, over all processes and micro-batches; micro_batch: examples a forward pass.
        rank, alpha, targets, dropout: LoRA.
        lr, lr_schedule, clip: LoRA's AdamW.
        lr_at_hidden: hidden size that `lr` is meant for; other widths scale it by (lr_at_hidden / hidden size)^0.75.
            None: as it is.
        mask_lr, mask_schedule, lambda_lr: AdamW rates of log-alpha and (ascending) of the multipliers.
        constraint: "lagrangian" as published, or "projection".
        cost_aware: under projection, charge each gate for its parameters.
        start: "open" as published, or "score".
        open_mean, channel_droprate: initial log-alpha of an open gate, and FFN gates' initial drop rate.
        score_batches, score_spread: batches behind the starting scores; spread of the starting log-alpha.
        noise: "batch" (one draw an update) or "example" (one draw an example).
        layer_gates: "none", or the published option that switches pruning on per "layer" or "sublayer".
        finish: "soft" keeps survivors' mask values as published; "hard" sets them to 1.
        layout: "free" or "uniform" (equal widths in all layers).
        multiple_of: kind -> multiple that kept counts are rounded to by re-admitting the highest gates.
        floor: kind -> fewest units a layer keeps; "keep" for its share of them.
        checkpointing: recompute activations in the backward pass.
        save_adapter: also keep the adapter as it was before merging, in the result's folder `adapters`.
        precision: "auto", "no" or "bf16" autocast.
        max_steps: cap on all updates together; phases shrink with it.
        save_every: updates between training checkpoints.
    """

    keep: Share = 0.7
    of: Counted = "blocks"
    kinds: tuple[Kind, ...] = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)
    tune: Duration = "1 epoch"
    ramp: Duration = "5 epochs"
    hold: Duration = "1 epoch"
    ramp_shape: Literal["linear", "cubic"] = "linear"
    batch: Count = 8
    micro_batch: Count = 8
    rank: Count = 8
    alpha: Annotated[float, Gt(0)] = 8.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    lr: Rate = 5e-5
    lr_at_hidden: Annotated[int, Ge(1)] | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    clip: Rate | None = 1.0
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
    noise: Literal["batch", "example"] = "batch"
    layer_gates: Literal["none", "layer", "sublayer"] = "none"
    finish: Literal["soft", "hard"] = "soft"
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
        uniform = self.kinds if self.layout == "uniform" else ()
        return Budget(
            self.keep,
            self.of,
            self.kinds,
            uniform_over=uniform,
            multiple_of=self.multiple_of or {},
            floor=self.floor or {},
        )

    def __call__(self, job: Job) -> Job:
        """Train gates and LoRA together, land on the budget, merge, fold and shrink."""
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind in self.kinds]
        cost, budget = job.cost(), self.budget()
        if self.layout == "uniform":
            constraint = CountsPerLayer(axes, uniform_targets(axes, cost, budget), cost, self.of)
        else:
            constraint = ShareOfModel(cost, self.keep, self.of)
        phases = [updates(one, len(job.rows), self.batch) for one in (self.tune, self.ramp, self.hold)]
        tune, ramp, hold = shortened(phases, self.max_steps)
        total = tune + ramp + hold

        gates = Gates(axes, self._initial(job, axes, cost)).to(job.device)
        lora = attach_(job.model, self.rank, self.alpha, self.targets, self.dropout, job.seed)
        if self.checkpointing:
            recompute_(job.model, on=True)
        objective = GatedObjective(
            lora,
            gates,
            constraint,
            starts=tune,
            progress=schedule.progress(self.ramp_shape, ramp),
            use_lagrangian=self.constraint == "lagrangian",
            noise=self.noise,
            seed=job.seed,
            layer_gates=self.layer_gates,
            cost_aware=self.cost_aware,
        )
        lr = schedule.rate_for_width(self.lr, self.lr_at_hidden, job.model.config.hidden_size)
        adapters = [parameter for parameter in lora.parameters() if parameter.requires_grad]
        groups = [
            Group("lora", adapters, lr, schedule.rate(self.lr_schedule, total), clip=self.clip),
            Group("gates", objective.gate_parameters(), self.mask_lr, schedule.rate(self.mask_schedule, total)),
        ]
        if objective.multipliers():
            groups.append(Group("multipliers", objective.multipliers(), self.lambda_lr, ascend=True))

        def after_update(update: int) -> Mapping[str, float]:
            """Clamp after every update; under projection, also shift back onto the budget."""
            if update < tune:
                return {}
            objective.clamp_()
            if self.constraint == "projection":
                objective.project_(update - tune + 1)
            return objective.state()

        with objective.attached():
            history = fit(
                objective,
                groups,
                job.batches(self.batch, "learn_gates"),
                total,
                seed=job.seed,
                accumulation=job.accumulation(self.batch, self.micro_batch),
                precision=self.precision,
                device=job.device,
                after_update=after_update,
                checkpoints=job.checkpoints(),
                save_every=self.save_every,
                progress=job.progress(),
                phase=lambda update: "tune" if update < tune else "ramp" if update < tune + ramp else "hold",
            )
        if self.checkpointing:
            recompute_(job.model, on=False)
        if self.save_adapter:
            job.keep_adapter(lora, "learn_gates")
        expected = 1 - constraint.sparsity(objective.keep_probabilities()).item()
        masks = self._project(objective.final_values(), axes, cost, budget)
        merged = replace(job, model=merge_(lora))
        return merged.without(
            masks,
            "learn_gates",
            updates={"tune": tune, "ramp": ramp, "hold": hold},
            trainable={
                "lora": sum(p.numel() for p in adapters),
                "gates": len(gates),
                "multipliers": sum(p.numel() for p in objective.multipliers()),
            },
            wanted_keep=self.keep,
            lr=lr,
            expected_keep=expected,
            curve=curve(history),
        )

    def _initial(self, job: Job, axes: Sequence[Axis], cost: CostModel) -> dict[str, Tensor]:
        """Starting log-alpha: open as published, or spread by gate-Taylor score around the budget's threshold."""
        if self.start == "open":
            generator = torch.Generator().manual_seed(mixed_seed("log-alpha", job.seed))
            means = {axis.name: None if axis.kind == Kind.CHANNEL else self.open_mean for axis in axes}
            return {
                axis.name: hard_concrete.initial_log_alpha(
                    axis.kind, axis.size, generator, droprate=self.channel_droprate, mean=means[axis.name]
                )
                for axis in axes
            }
        source = job.batches(self.batch, "gate_taylor")
        parts = [
            range(start, min(start + self.micro_batch, self.batch)) for start in range(0, self.batch, self.micro_batch)
        ]
        batches = [source.at(update, part) for update in range(self.score_batches) for part in parts]
        how = job.observing("scores", job.same("learn_gates", self))
        scores = sensitivity_per_parameter(job.model, axes, cost, batches, how)
        logs = {name: score.clamp(min=1e-30).log() for name, score in scores.items()}
        pooled = torch.cat(list(logs.values()))
        spread = {
            name: (log - pooled.mean()) / pooled.std().clamp(min=1e-6) * self.score_spread for name, log in logs.items()
        }
        shift = shift_to_budget(spread, cost, self.keep, self.of)
        return {name: hard_concrete.clamp_(one + shift) for name, one in spread.items()}

    def _project(
        self, values: Mapping[str, Tensor], axes: Sequence[Axis], cost: CostModel, budget: Budget
    ) -> dict[str, Tensor]:
        """Masks of exactly the budget: the deterministic rule, or the highest gates where layouts or multiples are
        asked for.
        """
        values = {name: value.cpu() for name, value in values.items()}
        if self.finish == "soft" and self.layout == "free" and not budget.rounds:
            return deterministic_to_budget(values, axes, cost, self.keep, self.of)
        masks = allocate(axes, values, cost, budget).masks(axes)
        if self.finish == "hard":
            return masks
        return {name: mask * hard_concrete.soft_value(values[name]) for name, mask in masks.items()}
