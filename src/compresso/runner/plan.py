"""A dry run: what a recipe would do to a model, from its config alone. A run goes through it first, so that both refuse
the same things.

The stages are acted out in order on the meta device: adapters are attached and counted, and units that are all alike
are removed to the budget. Memory and time are estimates, and named so.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from compresso.arch.base import arch_for
from compresso.checkpoint.source import Source, is_causal, meta_model, open_source
from compresso.core.axis import Axis
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.lora import adapter_parameters, attach_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, BudgetError
from compresso.formats.layout import stock_obstacle, uniform_obstacle, widest
from compresso.formats.plain import check_plain, check_written
from compresso.formats.shrunk import describe
from compresso.job import accumulation
from compresso.metrics.size import counts
from compresso.native import family_of
from compresso.runner.engine_shapes import misfits, multiples, parse_engine, without_multiple, words
from compresso.runner.options import for_family
from compresso.runner.recipe import Recipe, build
from compresso.solve.allocate import allocate
from compresso.solve.uniform import uniform_targets
from compresso.training.device import choose_device
from compresso.training.duration import shortened, updates

FLOPS_PER_MAC = 4
"""Of a LoRA step: 2 forward, 2 for activation gradients; gradients of frozen weights are not taken, those of trained
ones cost 2 more.
"""
TRAINED_BYTES = 16
"""Of a trained parameter with its gradient and AdamW's two moments, float32."""


@dataclass(frozen=True)
class Trained:
    """A training stage as it would find its model.

    Args:
        name, stage: its name in the recipe, and its knobs.
        config: of the model it trains.
        parameters, macs: of that model, in all and per token.
        trainable: parameters by group: "lora" or, where all weights learn, "all", and "gates" for a stage that learns
            them.
        teacher: parameters and multiply-accumulates per token of the dense model that runs beside it; zeros without
            one.
    """

    name: str
    stage: Any
    config: PreTrainedConfig
    parameters: int
    macs: int
    trainable: Mapping[str, int]
    teacher: tuple[int, int] = (0, 0)


@dataclass
class DryRun:
    """What acting a recipe out showed.

    Args:
        before, after: counts as `inspect` gives them.
        shapes: axis -> [kept, size] of the axes that lose units.
        notes: a sentence for each budget.
        training: the training stages.
        layouts: layout -> why it could not hold these shapes, or None if it can.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    shapes: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    notes: list[str] = field(default_factory=list[str])
    training: list[Trained] = field(default_factory=list[Trained])
    layouts: dict[str, str | None] = field(default_factory=dict[str, str | None])


def dry_run(recipe: Recipe, source: Source) -> DryRun:
    """Go through a recipe without weights and data.

    Raises:
        CompressoError: for what the run would refuse on its way: an architecture that nobody described, a budget that
            cannot be met, LoRA targets that no layer has, batches that cannot be split, shapes that no checkpoint of
            the family holds.
    """
    if not is_causal(source.config):
        raise ArchError(
            f"{source.name} ({source.config.model_type}) is not a causal language model, and recipes train and measure"
            " only those; shrink it from Python with compresso.shrink_ and write it with compresso.formats.hf"
        )
    model = meta_model(source)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    sizes = {axis.name: axis.size for axis in axes}
    dense = (int(cost().total), int(cost().macs))
    shown, removed = DryRun(counts(cost), counts(cost)), Plan()
    steps: tuple[tuple[str, Any], ...] = recipe.stages
    for name, stage in steps:
        if hasattr(stage, "micro_batch"):
            accumulation(stage.batch, stage.micro_batch)
        if hasattr(stage, "check"):
            stage.check(model, arch)
        if hasattr(stage, "rank"):
            total, macs = int(cost().total), int(cost().macs)
            if getattr(stage, "train", "lora") == "all":
                trainable = {"all": total}
            else:
                adapted = attach_(model, stage.rank, stage.alpha, stage.targets)
                if getattr(stage, "scores_by_adapters", False):
                    adapter_parameters(adapted)
                trainable = {"lora": sum(p.numel() for p in adapted.parameters() if p.requires_grad)}
                adapted.unload()
            if hasattr(stage, "mask_lr"):
                trainable["gates"] = sum(axis.size for axis in axes if axis.kind in stage.kinds)
            teacher = dense if hasattr(stage, "teacher_dtype") else (0, 0)
            shown.training.append(Trained(name, stage, model.config, total, macs, trainable, teacher))
        if hasattr(stage, "budget"):
            budget, plan = dry_run_plan(name, axes, cost, stage)
            removed = removed.then(plan)
            of = budget.of if budget else "blocks"
            share = float(cost.of(plan).count(of) / cost().count(of))
            wanted = f"; wanted {budget.keep:g}" if budget and budget.keep < 1 else ""
            shown.notes.append(f"{name}: about {share:.4f} of {of} stay{wanted}")
            shrink_(model, axes, plan)
            axes = arch.axes(model)
            cost = CostModel(axes, arch.weights(model))
    shown.after = counts(cost)
    shown.shapes = {name: [len(units), sizes[name]] for name, units in removed.kept.items()}
    if family_of(source.config.model_type) is None:
        check_plain(model, arch.shapes(model), "uniform")
        shown.layouts = {"uniform": None}
        return shown
    shrunk = describe(model, arch.shapes(model))
    shown.layouts = {
        "uniform": uniform_obstacle(shrunk),
        "padded": stock_obstacle(shrunk, widest(shrunk)),
        "native": None,
    }
    return shown


def _engine_costs(raw: Mapping[str, Any], model: str, source: Source, engine: str, shown: DryRun) -> list[str]:
    """What each constraint of an engine does to the size, in sentences; the others hold meanwhile."""
    want = parse_engine(engine)
    held = multiples(want, model)
    told: list[str] = []
    for kind, multiple in held.items():
        free = dry_run(build(without_multiple(raw, kind, multiple), "recipe"), source).after["parameters"]["total"]
        told.append(f"{words(want, kind, multiple)}: {shown.after['parameters']['total'] - free:+,} parameters")
    if want.uniform:
        told.append(f"{engine}: the same widths in every layer; a plan shows them in any case")
    return told + misfits(want, held, model)


def dry_run_plan(name: str, axes: tuple[Axis, ...], cost: CostModel, stage: Any) -> tuple[Budget | None, Plan]:
    """A stage's budget, and a plan within it for units that are all alike: proves that it can be met and shows its
    shapes.

    The plan is the stage's own if it has `dry_run_plan(axes, cost)`: one whose choice a budget does not describe. Its
    budget may be None.

    Raises:
        BudgetError: if it cannot, with the floor or multiple that stands in the way.
    """
    try:
        budget: Budget | None = stage.budget()
        if hasattr(stage, "dry_run_plan"):
            return budget, stage.dry_run_plan(axes, cost)
    except ValueError as error:
        raise BudgetError(f"stage '{name}': {error}") from error
    assert budget is not None  # only stages that dry_run_plan go without
    try:
        counted = uniform_targets(axes, cost, budget)
        return budget, Plan(
            {axis.name: tuple(range(counted[axis.kind])) for axis in axes if axis.kind in counted and axis.size}
        )
    except ValueError as first:
        if budget.uniform_over:
            raise BudgetError(f"stage '{name}': {first}") from first
        try:
            return budget, allocate(axes, {axis.name: torch.zeros(axis.size) for axis in axes}, cost, budget)
        except ValueError as error:
            raise BudgetError(f"stage '{name}': {error}") from error


def plan(raw: Mapping[str, Any], model: str, layout: str = "auto", engine: str | None = None) -> dict[str, Any]:
    """What a recipe would leave of a model, and what it would take.

    engine: what the recipe's budgets were held to (see `compresso.runner.engine_shapes`); the notes then say what each
    constraint costs.

    Returns:
        {"recipe", "model", "before", "after", "shapes", "notes", "layouts", "training", "weight_bytes"}. `after`,
        `shapes` and `layouts`
        are those of equal widths in every layer: methods that learn or score choose others of the same total. Numbers
            that depend on the
        length of the data are null.

    Raises:
        CompressoError: as `run` would, for everything that can be known without weights and data.
    """
    source = open_source(model, weights=False)
    if family_of(source.config.model_type) is None:
        check_written(source.config.model_type, layout)
    recipe = build(for_family(raw, layout, source.config), str(raw.get("name", "recipe")))
    shown = dry_run(recipe, source)
    if engine is not None:
        shown.notes += _engine_costs(raw, model, source, engine, shown)
    device = choose_device("auto")
    stored = _width(source.config)
    training = [_estimate(one, recipe, stored if device.type == "cuda" else 4) for one in shown.training]
    if any(one["flops_at_most"] for one in training):
        rate = matmul_rate(device)
        for one in training:
            one["seconds_estimated"] = None if one["flops_at_most"] is None else round(one["flops_at_most"] / rate, 1)
    return {
        "recipe": recipe.name,
        "model": source.name,
        "before": shown.before,
        "after": shown.after,
        "shapes": shown.shapes,
        "notes": shown.notes,
        "layouts": shown.layouts,
        "weight_bytes": {
            "before": shown.before["parameters"]["total"] * stored,
            "after": shown.after["parameters"]["total"] * stored,
        },
        "device": device.type,
        "training": training,
    }


def matmul_rate(device: torch.device, size: int = 1024, times: int = 4) -> float:
    """FLOPs a second of a square matrix product on this machine, in the type that training computes in: the best of a
    few.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = size * 8 if device.type == "cuda" else size
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds: list[float] = []
    for _ in range(times):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def _estimate(one: Trained, recipe: Recipe, width: int) -> dict[str, Any]:
    """A training stage's length, tokens, FLOPs and memory."""
    stage = one.stage
    durations = [getattr(stage, knob) for knob in ("tune", "ramp", "hold", "steps") if hasattr(stage, knob)]
    known = all(isinstance(duration, int) for duration in durations)
    steps = (
        sum(shortened([updates(duration, 1, 1) for duration in durations], stage.max_steps))
        if known
        else stage.max_steps
    )
    tokens = None if steps is None else steps * stage.batch * recipe.data.max_length
    at_once = min(stage.micro_batch, stage.batch) * recipe.data.max_length
    per_token = (FLOPS_PER_MAC + 2 * ("all" in one.trainable)) * one.macs + 2 * one.teacher[1]
    memory = {
        "weights": (one.parameters + one.teacher[0]) * width,
        "trained": sum(one.trainable.values()) * TRAINED_BYTES,
        "activations": activation_bytes(one.config, at_once, width, stage.checkpointing, getattr(stage, "chunk", None)),
    }
    return {
        "stage": one.name,
        "duration": " + ".join(str(duration) for duration in durations),
        "updates": steps,
        "trainable": dict(one.trainable),
        "tokens_at_most": tokens,
        "flops_at_most": None if tokens is None else per_token * tokens,
        "seconds_estimated": None,
        "memory_bytes_estimated": {**memory, "total": sum(memory.values())},
    }


def activation_bytes(
    config: PreTrainedConfig, tokens: int, width: int, checkpointing: bool, chunk: int | None = None
) -> int:
    """What a backward pass finds stored, roughly: per token and layer 8 hidden vectors, q, k, v and 4 FFN vectors;
    thrice the logits.

    chunk: tokens whose logits (then those of two models) exist at a time; None for all.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = head * (
        2 * config.num_attention_heads + 2 * getattr(config, "num_key_value_heads", config.num_attention_heads)
    )
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    ffn = next(filter(None, widths), 4 * config.hidden_size)
    layer = 8 * config.hidden_size + attention + 4 * ffn
    layers = config.num_hidden_layers * (config.hidden_size if checkpointing else layer) + (
        layer if checkpointing else 0
    )
    logits = 3 * tokens if chunk is None else 6 * min(chunk, tokens)
    return tokens * layers * width + logits * 4 * config.vocab_size


def _width(config: PreTrainedConfig) -> int:
    """Bytes of a stored number; 4 where the config names no dtype."""
    dtype = config.dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
