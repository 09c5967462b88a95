"""`compresso inspect`: what can be removed from a model, as a table."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from compresso.runner.inspection import inspect

__all__ = ["inspect", "show"]


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `inspect` returned, as JSON or as a table."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    parameters = facts["parameters"]
    console.print(f"[bold]{facts['architecture']}[/bold]  {parameters['total']:,} parameters")
    if "experts" in facts:
        _show_experts(console, facts)
        if not facts["axes"]:
            return
    if "stays" in facts:
        console.print("  nobody described this architecture: the axes were found from a trace of its operations")
    else:
        console.print(
            f"  blocks {parameters['blocks']:,} · embeddings {parameters['embeddings']:,} · norms"
            f" {parameters['norms']:,}"
        )
        macs, cached = facts["macs_per_token"], facts["kv_bytes_per_token"]
        if "macs_of" in facts:  # of a model of pictures
            console.print(f"  {macs:,} multiply-accumulates a {facts['macs_of']}")
        else:
            cache = f" and {cached:,} cache bytes" if cached else ""
            console.print(f"  {macs:,} multiply-accumulates{cache} a token")
    table = Table("what", "axes", "units each", "parameters a unit", title="What can be removed", title_justify="left")
    for row in (one for one in facts["axes"] if "stays" not in one):
        table.add_row(row["kind"], f"{row['count']:,}", _short(row["size"]), _short(row["parameters_per_unit"]))
    console.print(table)
    for row in (one for one in facts["axes"] if "stays" in one):
        units = f"{row['count']:,} axes of {_short(row['size'])} units"
        console.print(f"  {row['kind']}: {units}, which {row['stays']}", markup=False, soft_wrap=True)
    for sentence in facts.get("stays", ()):
        console.print(f"  {sentence}", markup=False, soft_wrap=True)
    if "explained" in facts:
        _show_explained(console, facts["explained"])


def _show_experts(console: Console, facts: Mapping[str, Any]) -> None:
    """What was counted of a mixture of experts."""
    parameters, experts = facts["parameters"], facts["experts"]
    active = f" · {parameters['active']:,} active a token" if "active" in parameters else ""
    chosen = f", {experts['per_token']} chosen a token" if experts["per_token"] else ""
    console.print(f"  experts {parameters['experts']:,} · embeddings {parameters['embeddings']:,}{active}")
    each = f"{experts['fewest']} to {experts['each']}" if "fewest" in experts else f"{experts['each']}"
    console.print(f"  {each} experts in each of {experts['layers']} layers{chosen}")
    for sentence in facts.get("stays", ()):
        console.print(f"  stays: {sentence}", markup=False, soft_wrap=True)


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
    if said["masked_at"]:  # tokens are masked nowhere
        console.print(f"  masked at: {', '.join(said['masked_at'])}", markup=False, soft_wrap=True)
    if said["folded_norms"]:
        console.print(f"  norms that are rescaled: {', '.join(said['folded_norms'])}", markup=False, soft_wrap=True)


def _short(value: int | list[int]) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{min(value):,} to {max(value):,}"
