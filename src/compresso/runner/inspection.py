"""What can be removed from a model, counted without its weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.checkpoint.source import meta_model, open_source
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.score import parameters_per_unit
from compresso.discover.axes import Discovery, Found, discover
from compresso.discover.explain import explain
from compresso.errors import ArchError
from compresso.metrics.size import counts
from compresso.native.stock import as_stock


def inspect(model: str | Path | PreTrainedModel, explained: str | None = None) -> dict[str, Any]:
    """Counts and axes of a hub id, a folder, a config.json or a live model; `explained` adds what leaves with one axis,
    and why.

    Returns:
        `{"architecture", "parameters": {"total", "blocks", "embeddings", "norms"}, "axes": [{"kind", "count", "size",
        "parameters_per_unit"}], "macs_per_token", "kv_bytes_per_token"}`. `size` and `parameters_per_unit` are lists
        where layers differ. `parameters_per_unit` is what leaves the model with one unit of the dense model, embeddings
        and norms included. For an architecture nobody described the axes are found from a trace, of the parameters only
        the total is counted, and "stays" says which dimensions cannot leave. `explained` adds "explained"; see
        `compresso.discover.explain`.

    Raises:
        CheckpointError: if there is no such model or it is unsafe to read.
        ArchError: if nobody described its architecture and a trace cannot prove its axes, or no axis is called as
            `explained` says.
    """
    live = as_stock(model) if isinstance(model, PreTrainedModel) else meta_model(open_source(model, weights=False))
    arch = _described(live)
    traced = discover(live) if arch is None or explained else None
    facts = describe(live, arch) if arch else describe_traced(live, traced) if traced else {}
    return {**facts, "explained": explain(traced, explained)} if traced and explained else facts


def _described(model: PreTrainedModel) -> Arch | None:
    """The architecture's description, None if there is none."""
    try:
        return arch_for(model.config)
    except ArchError:
        return None


def describe_traced(model: PreTrainedModel, discovery: Discovery) -> dict[str, Any]:
    """The dictionary of `inspect` for a model whose axes were found from a trace."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rows: list[dict[str, Any]] = []
    for kind in Kind:
        of_kind = [found for found in discovery.found if found.kind == kind]
        if of_kind:
            sizes, units = [found.size for found in of_kind], [_entries_per_unit(found, shapes) for found in of_kind]
            rows.append(
                {
                    "kind": str(kind),
                    "count": len(of_kind),
                    "size": _one_or_all(sizes),
                    "parameters_per_unit": _one_or_all(units),
                }
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    stays = [str(fixed) for fixed in discovery.fixed]
    return {"architecture": model.config.model_type, "parameters": {"total": total}, "axes": rows, "stays": stays}


def _entries_per_unit(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters that leave with one unit, on average where units differ (whole sub-layers)."""
    left = {owner.param: list(shapes[owner.param]) for owner in found.owners}
    for owner in found.owners:
        left[owner.param][owner.dim] -= len(owner.unit_of) // found.size
    sliced = sum(math.prod(shapes[name]) - math.prod(sizes) for name, sizes in left.items())
    return sliced + sum(math.prod(shapes[part.param]) for part in found.whole) // found.size


def describe(model: PreTrainedModel, arch: Arch) -> dict[str, Any]:
    """The dictionary of `inspect` for a live model (the meta device will do)."""
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    per_unit = parameters_per_unit(axes, cost, of="total")
    rows: list[dict[str, Any]] = []
    for kind in Kind:
        of_kind = [axis for axis in axes if axis.kind == kind]
        if of_kind:
            sizes = [axis.size for axis in of_kind]
            units = [round(per_unit[axis.name]) for axis in of_kind]
            rows.append(
                {
                    "kind": str(kind),
                    "count": len(of_kind),
                    "size": _one_or_all(sizes),
                    "parameters_per_unit": _one_or_all(units),
                }
            )
    return {"architecture": arch.name, **counts(cost), "axes": rows}


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `inspect` returned, as JSON or as a table."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    parameters = facts["parameters"]
    console.print(f"[bold]{facts['architecture']}[/bold]  {parameters['total']:,} parameters")
    if "stays" in facts:
        console.print("  nobody described this architecture: the axes were found from a trace of its operations")
    else:
        console.print(
            f"  blocks {parameters['blocks']:,} · embeddings {parameters['embeddings']:,} · norms"
            f" {parameters['norms']:,}"
        )
        console.print(
            f"  {facts['macs_per_token']:,} multiply-accumulates and {facts['kv_bytes_per_token']:,} cache bytes a"
            " token"
        )
    table = Table("what", "axes", "units each", "parameters a unit", title="What can be removed", title_justify="left")
    for row in facts["axes"]:
        table.add_row(row["kind"], f"{row['count']:,}", _short(row["size"]), _short(row["parameters_per_unit"]))
    console.print(table)
    for sentence in facts.get("stays", ()):
        console.print(f"  {sentence}", markup=False, soft_wrap=True)
    if "explained" in facts:
        _show_explained(console, facts["explained"])


def _show_explained(console: Console, said: Mapping[str, Any]) -> None:
    """What leaves with one unit of an axis, or why a parameter stays."""
    if "stays" in said:
        for reason in said["stays"]:
            console.print(f"{said['name']} {reason}", markup=False, soft_wrap=True)
        return
    table = Table(
        "tensor",
        "dimension",
        "entries a unit",
        "why",
        title=f"What leaves with a unit of {said['name']}",
        title_justify="left",
    )
    for tensor in said["tensors"]:
        whole = tensor["dim"] is None
        table.add_row(
            tensor["name"],
            "all" if whole else str(tensor["dim"]),
            "all" if whole else f"{tensor['entries']:,}",
            tensor["why"],
        )
    console.print(table)
    console.print(f"  masked at: {', '.join(said['masked_at'])}", markup=False, soft_wrap=True)
    if said["folded_norms"]:
        console.print(f"  norms that are rescaled: {', '.join(said['folded_norms'])}", markup=False, soft_wrap=True)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _short(value: int | list[int]) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{min(value):,} to {max(value):,}"
