"""What `compresso plan` prints."""

import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from compresso.core.counted import counted

ACTIVE = "active_parameters_per_token"
"""What is counted of mixtures of experts alone."""


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `runner.plan.plan` returned, as JSON or as tables."""
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    console = Console()
    title = f"{facts['recipe']} on {facts['model']}: a dry run"
    table = Table("", "before", _after(facts), "ratio", title=title, title_justify="left")
    before, after = facts["before"], facts["after"]
    rows = [
        (f"parameters, {name}", before["parameters"][name], after["parameters"][name]) for name in before["parameters"]
    ]
    unit = facts["counted_by"]
    rows += [
        (f"{name.removesuffix('_per_token').replace('_', ' ')} per {unit}", before[name], _counted(after, name))
        for name in before
        if name.endswith("_per_token") and (before[name] or name != "kv_bytes_per_token")
    ]
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
    if any(one["flops_at_most"] is None for one in facts["stages"]):
        cure = "an epoch of it is below" if facts.get("data") else "give --data"
        console.print(f"?: the length of the data decides; {cure}.", soft_wrap=True)
    console.print(
        f"{_several(unit).capitalize()} are at most these. Time is estimated from the passes over the model at the"
        f" matrix-product rate of {facts['device']}; real steps take longer.",
        soft_wrap=True,
    )
    if facts.get("data"):
        for line in _data(facts["data"]):
            console.print(line, markup=False, soft_wrap=True)
    for one in facts["compressed"]:
        console.print(_compressed(one, facts["device"]), markup=False, soft_wrap=True)
    for one in facts["stages"]:
        if one["merging"]:
            console.print(_merging(one, facts["device"]), markup=False, soft_wrap=True)
        elif one["memory_bytes_estimated"] is not None:
            console.print(
                f"{one['stage']}: the dense model lies beside its own; about {_bytes(one['memory_bytes_estimated'])} on"
                f" {facts['device']} (estimated), activations not among it",
                soft_wrap=True,
            )
    for one in facts["training"]:
        memory = one["memory_bytes_estimated"]
        exchanged = f", gradients once more to send {_bytes(memory['exchanged'])}" if "exchanged" in memory else ""
        console.print(
            f"{one['stage']}: {_length(one, facts.get('data'))}; about {_bytes(memory['total'])} on {facts['device']}"
            f" (estimated: weights {_bytes(memory['weights'])}, trained {_bytes(memory['trained'])}, activations"
            f" {_bytes(memory['activations'])}{exchanged})",
            soft_wrap=True,
        )
        if (spread := one.get("memory_bytes_spread")) is not None:
            console.print(
                f"{one['stage']}: launched with FSDP 2, about {_bytes(spread['training'])} on each while it trains, and"
                f" {_bytes(spread['around'])} before and after (estimated)",
                soft_wrap=True,
            )
        if one["disk_bytes_at_most"] is not None:
            console.print(
                f"{one['stage']}: the dense model is asked before, and not in memory with the smaller one; at most"
                f" {_bytes(one['disk_bytes_at_most'])} on disk while the stage runs",
                soft_wrap=True,
            )
    for one in facts["trust"]:
        console.print(_trust(one, facts["device"]), markup=False, soft_wrap=True)


def _merging(one: Mapping[str, Any], device: str) -> str:
    """What aligning experts takes."""
    merging = one["merging"]
    return (
        f"{one['stage']}: {counted(merging['experts'], 'expert')} of {merging['width']:,} channels merged, each aligned"
        f" by an assignment that grows with the cube of the width: of the time about"
        f" {_time(merging['seconds_estimated'])} (estimated, on one core of this machine, whatever the data), about"
        f" {_bytes(one['memory_bytes_estimated'])} on {device} (estimated: {_bytes(merging['bytes_beside'])} beside"
        f" the weights), and {_bytes(merging['bytes_of_host'])} of the host's memory for an assignment"
    )


def _trust(one: Mapping[str, Any], device: str) -> str:
    """What asking the models would take."""
    absent = f"; not measured: {', '.join(one['not_measured'])}" if one["not_measured"] else ""
    return (
        f"{one['what']}: {counted(one['requests'], 'request')} to each of {one['models']} models, {_short(one['read'])}"
        f" tokens read and at most {_short(one['written_at_most'])} written by each; at most"
        f" {_short(one['flops_at_most'])} FLOPs, about {_time(one['seconds_estimated'])} on {device} (estimated)"
        f"{absent}"
    )


def _counted(after: Mapping[str, Any], name: str) -> int:
    """A count of the result; where no mixture of experts is left, a token meets every parameter."""
    return after["parameters"]["total"] if name == ACTIVE and name not in after else after[name]


def _after(facts: Mapping[str, Any]) -> str:
    """The heading of what is left: widths are counted as equal only where layers lose units of their own, and come out
    equal.
    """
    narrower = any(kept < size for axis, (kept, size) in facts["shapes"].items() if "." in axis)
    return "after (equal widths)" if narrower and facts["layouts"].get("uniform") is None else "after"


def _length(one: Mapping[str, Any], data: Mapping[str, Any] | None) -> str:
    """How long a stage trains, as it was asked for and in updates."""
    asked, most, rounds = one["duration"], one["updates"], one["rounds"]
    if "epoch" not in asked:
        phases = [int(phase) for phase in asked.split(" + ")]
        whole, asked = sum(phases), " + ".join(f"{phase:,}" for phase in phases)
        words = f"{asked} updates" if "+" in asked else counted(whole, "update")
        if rounds > 1:
            return f"{counted(most, 'update')} of {asked}, in {rounds} rounds"
        return words if most == whole else f"{counted(most, 'update')}, by max_steps, of {asked}"
    if data is not None:
        taken = next(row["updates"] for row in data["epochs"] if row["stage"] == one["stage"])
        return f"{asked}, {counted(taken, 'update')}"
    return (
        f"{asked}, at most {counted(most, 'update')}" if most else f"{asked}; the number of updates depends on --data"
    )


def _compressed(one: Mapping[str, Any], device: str) -> str:
    """What a stage does to how many weights, and in which memory."""
    done = [f"{one['sparsity']:.0%} become zero".replace("%", " %")] if one["sparsity"] else []
    done += [] if one["bits"] is None else [f"{one['bits']:.3g} bits each once packed"]
    if one["factored"] is not None:
        done.append(
            f"factors of {one['factored']:,} numbers, and as many multiplications a token, once exported as low-rank"
        )
    dense = one["bits"] is None and one["factored"] is None
    stored = "; zeros are stored dense, so that no byte is saved" if dense else ""
    return (
        f"{one['stage']}: works on {one['weights']:,} weights, {', '.join(done) or 'unchanged'}{stored}; about"
        f" {_bytes(one['memory_bytes_estimated'])} on {device} (estimated)"
    )


def _data(data: Mapping[str, Any]) -> list[str]:
    """What became of the data, a sentence each."""
    examples, at, tokens = data["examples"], "", ""
    if examples["tokens"]:  # pictures have none
        at = f" at {data['max_length']} tokens"
        tokens = f"; tokens {examples['tokens']:,}, of which {examples['response_tokens']:,} are learned"
    lines = [
        f"data: {data['source']} ({data['kind']})",
        f"data: {data['survive']:,} of {examples['n']:,} records survive{at}; rows of training {data['train']:,}, held"
        f" out {data['held']:,}{tokens}",
    ]
    if data["columns"]:
        lines.append(f"data: columns read: {', '.join(data['columns'])}")
    lines += [f"data: {note}" for note in data["notes"]]
    lines += [
        f"{one['stage']}: an epoch is {counted(one['updates_an_epoch'], 'update')} of {counted(one['batch'], 'row')};"
        f" it takes {counted(one['updates'], 'update')}"
        for one in data["epochs"]
    ]
    return lines + ([f"A run would stop: {data['stops']}"] if data["stops"] else [])


def _costs(facts: Mapping[str, Any]) -> Table:
    """A row for each kind of passes of each stage."""
    table = Table(
        title=f"What the stages take, in {_several(facts['counted_by'])}", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("stage", no_wrap=True)
    table.add_column("passes")
    for name in ("forward", "backward", "FLOPs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in facts["stages"]:
        if not one["passes"]:
            table.add_row(one["stage"], "none", *["-"] * 4)
        for number, row in enumerate(one["passes"]):
            tokens = row["tokens_at_most"]
            table.add_row(
                "" if number else one["stage"],
                row["what"],
                _short(None if tokens is None else tokens * row["forwards"]),
                _short(None if tokens is None else tokens * row["backwards"]),
                _short(row["flops_at_most"]),
                "" if number else "?" if one["seconds_estimated"] is None else _time(one["seconds_estimated"]),
            )
        if one["merging"]:
            table.add_row("", "merging", "-", "-", _short(one["merging"]["flops"]), "")
    return table


def _several(unit: str) -> str:
    """More than one of what is counted by."""
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


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
