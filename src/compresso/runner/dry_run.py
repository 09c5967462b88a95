"""A dry run: a recipe acted out on a model's shapes, from its config alone. A run goes through it first, so that both
refuse the same things.

The stages are acted out in order on the meta device: adapters are attached and counted, and units that are all alike
are removed to the budget.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.arch.costs import cost_of, shape_facts
from compresso.arch.queries import WITHIN, axes_of
from compresso.arch.whole_layers import with_layers
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import Source
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, lower
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.lora import adapter_parameters, attach_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, BudgetError, RecipeError
from compresso.metrics.size import counts
from compresso.runner.acted import Acted, DryRun, Met
from compresso.runner.dry_budget import dry_run_plan, emptied, gone, untrainable
from compresso.runner.dry_layouts import layouts
from compresso.runner.earlier_run import lost, rounded_by
from compresso.runner.lacking import said_of_kinds
from compresso.runner.measured_budget import refuse_other_table
from compresso.runner.other_recipes import of_next_tokens
from compresso.runner.recipe import Recipe
from compresso.runner.rounds import Begun, told
from compresso.runner.task_options import keeps_heads
from compresso.runner.taught import check_taught
from compresso.stage import (
    Calibrates,
    ChecksModel,
    ChecksProcesses,
    Compresses,
    Effects,
    FitsModel,
    KeepsZeros,
    Learning,
    Learns,
    Merges,
    ReachesLayers,
    Remarks,
    Shrinks,
    Sweeps,
    Trains,
    card,
    groups_of,
    learned_bytes,
)
from compresso.sweep.compressed import Compressed
from compresso.sweep.memory import estimate
from compresso.tasks.base import DEFAULT
from compresso.training.launch import accumulation
from compresso.training.launch import processes as launched

MIXTURES = "moe/"
"""How the names of recipes for mixtures of experts begin."""
SOME_LABELS = ("0", "1")
"""What a head is counted for while no data says how many labels there are."""


def dry_run(recipe: Recipe, source: Source, processes: int | None = None) -> DryRun:
    """Go through a recipe without weights and data.

    Args:
        recipe, source: which.
        processes: that would run it; None for those that were launched.

    Raises:
        CompressoError: for what the run would refuse on its way: an architecture that nobody described, a budget that
            cannot be met, LoRA targets that no layer has, batches that cannot be split, weights that would leave the
            grid they were rounded to, shapes that no checkpoint of the family holds.
    """
    if obstacle := recipe.task.obstacle(source.config):
        raise ArchError(f"{source.name} {of_next_tokens(recipe, source.config) or obstacle}")
    model = meta_model(source)
    if recipe.task.lacks_head(source.config):
        model = recipe.task.with_head(model, SOME_LABELS, 0)
    arch = arch_for(model.config)
    axes = axes_of(arch, model, WITHIN)
    refuse_other_table(recipe.measures, shape_facts(arch, model))
    cost = cost_of(arch, model, recipe.measures)
    sizes, dense = {axis.name: axis.size for axis in axes}, len(arch.blocks(model))
    shown, removed = DryRun(counts(cost), counts(cost), notes=told(recipe.acts)), Plan()
    if recipe.name.startswith(MIXTURES) and not any(axis.kind == Kind.EXPERT for axis in axes):
        does = " and ".join(dict.fromkeys(act.name for act in recipe.acts))
        shown.dense = (
            f"recipe {recipe.name} is for mixtures of experts, and this {model.config.model_type} has none: {does} take"
            " its dense layers as they are"
        )
    fixed: list[str] = []  # stages that take heads or hidden dimensions and have no knob to leave them
    rounded, earlier = "", rounded_by(source)  # the last stage that rounded weights, and that of an earlier run
    without: list[
        tuple[str, InfeasibleBudget]
    ] = []  # what to say should a later stage need what a budget leaves nothing of
    begun: Begun | None = None  # what the first of several rounds received
    for place, act in enumerate(recipe.acts):
        name = act.label
        if act.cuts and act.turn == 1:
            assert isinstance(act.stage, Shrinks)
            _planned(
                act.name, axes, cost, act.stage, recipe, model.config
            )  # all at once, so that a floor is told of all rounds
            begun = Begun.of(act.stage, axes, cost)
        given = act.taken(begun if act.cuts else None, cost, None)
        stage = given.fitted(axes) if isinstance(given, FitsModel) else given
        for group in groups_of(stage).values():
            if isinstance(group, Calibrates | Trains):
                accumulation(group.batch, group.micro_batch, processes, name)
            if isinstance(group, Trains) and min(group.batch, group.micro_batch) < 2 and _has_batch_norms(model):
                raise RecipeError(
                    f"stage '{name}': micro_batch={group.micro_batch} shows batch norms one example at a time, whose"
                    " deviation is 0; give batch and micro_batch of 2 or more"
                )
        if isinstance(stage, ChecksModel):
            stage.check(model, arch)
        before = [other.name for other in recipe.acts[:place]]
        check_taught(act.name, stage, before, len(arch.blocks(model)), dense, removed, recipe.data)
        if isinstance(stage, ChecksProcesses):
            stage.check_processes(launched() if processes is None else processes)
        compressed = stage.compressed(model, arch) if isinstance(stage, Compresses) else None
        if isinstance(stage, KeepsZeros) and not any(
            one.compressed and one.compressed.sparsity for one in shown.stages
        ):
            shown.own_zeros.append(name)
            shown.notes.append(f"{name} keeps zeros and no stage before it makes any: they have to be the model's own")
        rounded = _last_to_round(rounded, act.name, compressed)
        if earlier and not rounded and not shown.lost and card(act.name).effects & (Effects.SHAPES | Effects.WEIGHTS):
            shown.lost = lost(source, name, earlier)
            shown.notes.append(shown.lost)
        learning = stage.learning() if isinstance(stage, Learns) else None
        try:
            trainable = {} if learning is None else _trainable(learning, model, axes, cost)
        except RecipeError as error:
            if not without or learning is None:
                raise
            _trainable(learning, meta_model(source), axes, cost)  # what no model of this kind has is no budget's fault
            raise untrainable(*without[-1], name) from error
        if isinstance(stage, ReachesLayers) and len(reached := with_layers(axes, arch, model)) > len(axes):
            axes, cost = reached, CostModel(reached, arch.weights(model))
            sizes |= {axis.name: axis.size for axis in axes if axis.name not in sizes}
        planned = _planned(name, axes, cost, stage, recipe, model.config) if isinstance(stage, Shrinks) else None
        total, macs, in_blocks = int(cost().total), int(cost().macs), int(cost().blocks)
        if isinstance(stage, Remarks) and act.turn == 1:
            shown.notes += [f"{name}: {remark}" for remark in stage.remarks(model, arch)]
        shown.stages.append(
            Acted(
                name,
                model.config,
                total,
                macs,
                stage.work(model, arch),
                learning,
                trainable,
                compressed,
                *(
                    _held(stage, model, arch, recipe.data.max_length, processes)
                    if isinstance(stage, Sweeps)
                    else (None, None)
                ),
                act,
                in_blocks,
                stage.merging(model, arch) if isinstance(stage, Merges) else None,
            )
        )
        if planned is not None:
            budget, plan = planned
            if (
                act.turn == 1
                and budget is not None
                and (lacks := said_of_kinds(model.config.model_type, axes, cost, budget))
            ):
                shown.lacking[name] = lacks
                shown.notes.append(f"{name}: {lacks}")
            removed = removed.then(plan)
            if "kinds" not in card(act.name).knobs and any(
                len(plan.kept.get(axis.name, range(axis.size))) < axis.size
                for axis in axes
                if axis.kind in (Kind.HEAD, Kind.HIDDEN)
            ):
                fixed.append(name)
            if budget is not None and (kinds := gone(axes, plan)):
                without.append((act.name, emptied(name, axes, cost, budget, kinds)))
            of = budget.of if budget else "blocks"
            share = float(cost.of(plan).count(of) / cost().count(of))
            keep = budget.keep if budget else 1.0
            if act.cuts and begun is not None:  # rounds are told as shares of what the first of them received
                share, keep = float(cost.of(plan).count(of)) / begun.whole, act.keep
            wanted = f"; wanted {keep:{'.4g' if act.cuts else 'g'}}" if keep < 1 else ""
            shown.notes.append(f"{name}: about {share:.4f} of {of} stay{wanted}")
            if budget and act.turn == act.turns:
                shown.budgets.append(Met(name, of, share, keep))
            shrink_(model, axes, plan)
            axes = axes_of(arch, model, WITHIN)
            cost = cost_of(arch, model, recipe.measures)
    shown.notes += [shown.dense] if shown.dense else []
    shown.after = counts(cost)
    shown.shapes = {name: [len(units), sizes[name]] for name, units in removed.kept.items()}
    shown.layouts = layouts(source.config.model_type, model, arch, fixed)
    return shown


def _planned(
    name: str, axes: tuple[Axis, ...], cost: CostModel, stage: Shrinks, recipe: Recipe, config: PreTrainedConfig
) -> tuple[Budget | None, Plan]:
    """As `dry_run_plan`; that all heads of a family stay is no knob of the recipe's to lower."""
    try:
        return dry_run_plan(name, axes, cost, stage)
    except BudgetError as error:
        found = error.__cause__
        whole = found.whole if isinstance(found, InfeasibleBudget) else None
        if whole != Kind.HEAD or recipe.task.name == DEFAULT or not keeps_heads(config):
            raise
        why = f"all heads stay, as a {config.model_type} config cannot say that some are gone"
        refused = error.refused and replace(error.refused, uncured=f"{error.refused.uncured}: {why}")
        raise BudgetError(str(error).replace(lower(whole), f" or name other kinds: {why}"), refused=refused) from found


def _has_batch_norms(model: PreTrainedModel) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _last_to_round(before: str, name: str, compressed: Compressed | None) -> str:
    """The last stage that rounded weights; "" for none.

    Raises RecipeError for one behind it that changes weights or shapes and rounds none: what few bits hold would be of
    no grid any more, and records would say it were.
    """
    if compressed is not None and compressed.bits is not None:
        return name
    if before and card(name).effects & (Effects.SHAPES | Effects.WEIGHTS):
        raise RecipeError(
            f"stage '{name}' changes weights or shapes behind '{before}', whose rounding would be lost; put '{name}'"
            f" before '{before}'"
        )
    return before


def _held(stage: Sweeps, model: PreTrainedModel, arch: Arch, length: int, processes: int | None) -> tuple[int, int]:
    """Bytes that a process of a sweep takes beside the weights, in float32, and in all where these stay on disk, in
    their own dtype, if every example has `length` tokens.
    """
    how, n = stage.calibration, launched() if processes is None else processes
    share = min(how.examples, how.batch * -(-how.examples // (how.batch * n)))  # whole batches
    groups, held = stage.check(model, arch), (stage.keeps_moments, learned_bytes(stage))
    found = [
        estimate(model, arch, groups, how, [length] * share, dtype, *held) for dtype in (torch.float32, model.dtype)
    ]
    return found[0].statistics + found[0].activations, found[1].total


def _trainable(learning: Learning, model: PreTrainedModel, axes: Sequence[Axis], cost: CostModel) -> dict[str, int]:
    """Parameters that learn, by group. Raises RecipeError for targets that no layer has or that cannot be scored."""
    if learning.frozen:
        found: dict[str, int] = {}
    elif learning.lora is None:
        found = {"all": int(cost().total)}
    else:
        lora = learning.lora
        adapted = attach_(model, lora.rank, lora.alpha, lora.targets, lora.dropout, strict=True)
        if learning.by_adapters:
            adapter_parameters(adapted)
        found = {"lora": sum(p.numel() for p in adapted.parameters() if p.requires_grad)}
        adapted.unload()
    gates = sum(axis.size for axis in axes if axis.kind in learning.gates)
    return found | ({"gates": gates} if learning.gates else {}) | (learning.own(model) if learning.own else {})
