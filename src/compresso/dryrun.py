"""A dry run: what a recipe would do to a model, from its config alone."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compresso.arch.base import arch_for
from compresso.checkpoint.source import meta_model, open_source
from compresso.core.allocate import allocate
from compresso.core.axis import Axis
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.uniform import uniform_targets
from compresso.drive.duration import updates
from compresso.errors import BudgetError
from compresso.inspection import counts
from compresso.recipe import Recipe, build

TRAINING_FLOPS = 4
"""FLOPs per parameter and token of a LoRA step: 2 forward, 2 for activation gradients; weight gradients of frozen weights are not taken."""


def plan(raw: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What a recipe would leave of a model.

    Returns:
        {"recipe", "before", "after", "shapes", "training": [{"stage", "updates", "tokens", "flops", "trainable"}], "memory_bytes"}.
        `after` and `shapes` are those of equal widths in every layer: methods that learn or score choose others of the same total.
        Updates given in epochs are null, since they depend on the data.

    Raises:
        CompressoError: as `run` would, for everything that can be known without weights and data.
    """
    recipe = build(raw, str(raw.get("name", "recipe")))
    source = open_source(model, weights=False)
    dense = meta_model(source)
    arch = arch_for(dense.config)
    axes = arch.axes(dense)
    cost = CostModel(axes, arch.weights(dense))
    before = counts(cost)
    after, shapes, notes = before, {}, []
    for name, stage in recipe.stages:
        budget = getattr(stage, "budget", None)
        if budget is None:
            continue
        wanted = rehearse(name, axes, cost, budget())
        masks = wanted.masks(axes)
        after = counts(cost, masks)
        shapes = {axis.name: [len(wanted.kept.get(axis.name, range(axis.size))), axis.size] for axis in axes if axis.name in wanted.kept}
        notes.append(
            f"{name}: keeps {after['parameters']['blocks'] / before['parameters']['blocks']:.4f} of the blocks; wanted {budget().keep:g} of {budget().of}"
        )
    width = torch.empty((), dtype=getattr(source.config, "dtype", None) or torch.float32).element_size()
    return {
        "recipe": recipe.name,
        "model": source.name,
        "before": before,
        "after": after,
        "shapes": shapes,
        "notes": notes,
        "training": [_training(name, stage, recipe, before) for name, stage in recipe.stages if hasattr(stage, "lr")],
        "memory_bytes": {"weights_before": before["parameters"]["total"] * width, "weights_after": after["parameters"]["total"] * width},
    }


def rehearse(stage: str, axes: tuple[Axis, ...], cost: CostModel, budget: Budget) -> Plan:
    """A plan within a budget for units that are all alike: proves that the budget can be met and shows its shapes.

    Raises:
        BudgetError: if it cannot, with the floor or multiple that stands in the way.
    """
    try:
        counted = uniform_targets(axes, cost, budget)
        return Plan({axis.name: tuple(range(counted[axis.kind])) for axis in axes if axis.kind in counted and axis.size})
    except ValueError as first:
        if budget.uniform_over:
            raise BudgetError(f"stage '{stage}': {first}") from first
        try:
            return allocate(axes, {axis.name: torch.zeros(axis.size) for axis in axes}, cost, budget)
        except ValueError as error:
            raise BudgetError(f"stage '{stage}': {error}") from error


def _training(name: str, stage: Any, recipe: Recipe, before: Mapping[str, Any]) -> dict[str, Any]:
    durations = [getattr(stage, knob) for knob in ("tune", "ramp", "hold", "steps") if hasattr(stage, knob)]
    in_updates = [one for one in durations if isinstance(one, int)]
    known = sum(updates(one, 1, 1) for one in in_updates) if len(in_updates) == len(durations) else None
    if known is not None and stage.max_steps is not None:
        known = min(known, stage.max_steps)
    tokens = None if known is None else known * stage.batch * recipe.data.max_length
    return {
        "stage": name,
        "duration": " + ".join(str(one) for one in durations),
        "updates": known,
        "tokens_at_most": tokens,
        "flops_at_most": None if tokens is None else TRAINING_FLOPS * before["parameters"]["total"] * tokens,
    }


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `plan` returned."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    table = Table(
        "", "before", "after (equal widths)", "ratio", title=f"{facts['recipe']} on {facts['model']}: a dry run", title_justify="left"
    )
    before, after = facts["before"], facts["after"]
    rows = [(name, before["parameters"][name], after["parameters"][name]) for name in before["parameters"]]
    rows += [(name.replace("_", " "), before[name], after[name]) for name in ("macs_per_token", "kv_bytes_per_token")]
    rows.append(("bytes of weights", facts["memory_bytes"]["weights_before"], facts["memory_bytes"]["weights_after"]))
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "-")
    console.print(table)
    for note in facts["notes"]:
        console.print(note)
    for one in facts["training"]:
        flops = f", at most {one['tokens_at_most']:,} tokens and {one['flops_at_most']:.2e} FLOPs" if one["tokens_at_most"] else ""
        console.print(f"{one['stage']}: {one['duration']} updates{flops}")
