"""What `compresso plan` prints."""

import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `runner.plan.plan` returned, as JSON or as tables."""
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    console = Console()
    title = f"{facts['recipe']} on {facts['model']}: a dry run"
    table = Table("", "before", "after (equal widths)", "ratio", title=title, title_justify="left")
    before, after = facts["before"], facts["after"]
    rows = [
        (f"parameters, {name}", before["parameters"][name], after["parameters"][name]) for name in before["parameters"]
    ]
    rows += [(name.replace("_", " "), before[name], after[name]) for name in ("macs_per_token", "kv_bytes_per_token")]
    rows.append(("bytes of weights", facts["weight_bytes"]["before"], facts["weight_bytes"]["after"]))
    if "packed" in facts["weight_bytes"]:
        rows.append(("bytes once packed", facts["weight_bytes"]["before"], facts["weight_bytes"]["packed"]))
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "-")
    console.print(table)
    for note in facts["notes"]:
        console.print(note, soft_wrap=True)
    for layout, obstacle in facts["layouts"].items():
        console.print(f"layout {layout}: {'no: ' + obstacle if obstacle else 'yes'}", markup=False, soft_wrap=True)
    console.print(_costs(facts))
    console.print(
        f"Tokens are at most these. Time is estimated from the passes over the model at the matrix-product rate of"
        f" {facts['device']}; real steps take longer.",
        soft_wrap=True,
    )
    if facts.get("data"):
        for line in _data(facts["data"]):
            console.print(line, markup=False, soft_wrap=True)
    for one in facts["compressed"]:
        console.print(_compressed(one, facts["device"]), markup=False, soft_wrap=True)
    for one in facts["stages"]:
        if one["memory_bytes_estimated"] is not None:
            console.print(
                f"{one['stage']}: the dense model lies beside its own; about {_bytes(one['memory_bytes_estimated'])} on"
                f" {facts['device']} (estimated), activations not among it",
                soft_wrap=True,
            )
    for one in facts["training"]:
        memory = one["memory_bytes_estimated"]
        console.print(
            f"{one['stage']}: {one['duration']} updates; about {_bytes(memory['total'])} on {facts['device']}"
            f" (estimated: weights {_bytes(memory['weights'])}, trained {_bytes(memory['trained'])}, activations"
            f" {_bytes(memory['activations'])})",
            soft_wrap=True,
        )


def _compressed(one: Mapping[str, Any], device: str) -> str:
    """What a stage does to how many weights, and in which memory."""
    done = [f"{one['sparsity']:.0%} become zero".replace("%", " %")] if one["sparsity"] else []
    done += [] if one["bits"] is None else [f"{one['bits']:.3g} bits each once packed"]
    stored = "" if one["bits"] is not None else "; zeros are stored dense, so that no byte is saved"
    return (
        f"{one['stage']}: works on {one['weights']:,} weights, {', '.join(done) or 'unchanged'}{stored}; about"
        f" {_bytes(one['memory_bytes_estimated'])} on {device} (estimated)"
    )


def _data(data: Mapping[str, Any]) -> list[str]:
    """What became of the data, a sentence each."""
    examples = data["examples"]
    lines = [
        f"data: {data['source']} ({data['kind']})",
        f"data: {data['survive']:,} of {examples['n']:,} records survive at {data['max_length']} tokens; rows of"
        f" training {data['train']:,}, held out {data['held']:,}; tokens {examples['tokens']:,}, of which"
        f" {examples['response_tokens']:,} are learned",
    ]
    if data["columns"]:
        lines.append(f"data: columns read: {', '.join(data['columns'])}")
    lines += [f"data: {note}" for note in data["notes"]]
    lines += [
        f"{one['stage']}: an epoch is {one['updates_an_epoch']:,} updates of {one['batch']} rows; it takes"
        f" {one['updates']:,} updates"
        for one in data["epochs"]
    ]
    return lines + ([f"A run would stop: {data['stops']}"] if data["stops"] else [])


def _costs(facts: Mapping[str, Any]) -> Table:
    """A row for each kind of passes of each stage."""
    table = Table(title="What the stages take, in tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    table.add_column("passes")
    for name in ("forward", "backward", "FLOPs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in facts["stages"]:
        if not one["passes"]:
            table.add_row(one["stage"], "none", *["-"] * 4)
        for number, row in enumerate(one["passes"]):
            tokens, last = row["tokens_at_most"], number == len(one["passes"]) - 1
            table.add_row(
                "" if number else one["stage"],
                row["what"],
                _short(None if tokens is None else tokens * row["forwards"]),
                _short(None if tokens is None else tokens * row["backwards"]),
                _short(row["flops_at_most"]),
                ("?" if one["seconds_estimated"] is None else _time(one["seconds_estimated"])) if last else "",
            )
    return table


def _short(count: float | None) -> str:
    """A count in three digits; "?" where the length of the data decides."""
    if count is None:
        return "?"
    if not count:
        return "-"
    for unit in ("", "K", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}E"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
