"""What can be removed from a model, counted without its weights."""

import json
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
from compresso.measure.size import counts
from compresso.native.stock import as_stock


def inspect(model: str | Path | PreTrainedModel) -> dict[str, Any]:
    """Counts and axes of a hub id, a folder, a config.json or a live model.

    Returns:
        `{"architecture", "parameters": {"total", "blocks", "embeddings", "norms"}, "axes": [{"kind", "count", "size",
        "parameters_per_unit"}], "macs_per_token", "kv_bytes_per_token"}`. `size` and `parameters_per_unit` are lists where layers differ.
        `parameters_per_unit` is what leaves the model with one unit of the dense model, embeddings and norms included.

    Raises:
        CheckpointError: if there is no such model or it is unsafe to read.
        ArchError: if nobody described its architecture.
    """
    live = as_stock(model) if isinstance(model, PreTrainedModel) else meta_model(open_source(model, weights=False))
    return describe(live, arch_for(live.config))


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
            rows.append({"kind": str(kind), "count": len(of_kind), "size": _one_or_all(sizes), "parameters_per_unit": _one_or_all(units)})
    return {"architecture": arch.name, **counts(cost), "axes": rows}


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `inspect` returned, as JSON or as a table."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    parameters = facts["parameters"]
    console.print(f"[bold]{facts['architecture']}[/bold]  {parameters['total']:,} parameters")
    console.print(f"  blocks {parameters['blocks']:,} · embeddings {parameters['embeddings']:,} · norms {parameters['norms']:,}")
    console.print(f"  {facts['macs_per_token']:,} multiply-accumulates and {facts['kv_bytes_per_token']:,} cache bytes a token")
    table = Table("what", "axes", "units each", "parameters a unit", title="What can be removed", title_justify="left")
    for row in facts["axes"]:
        table.add_row(row["kind"], f"{row['count']:,}", _short(row["size"]), _short(row["parameters_per_unit"]))
    console.print(table)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _short(value: int | list[int]) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{min(value):,} to {max(value):,}"
