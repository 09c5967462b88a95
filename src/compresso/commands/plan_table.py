"""What `compresso plan` prints."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `dryrun.plan` returned, as JSON or as a table."""
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
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "-")
    console.print(table)
    for note in facts["notes"]:
        console.print(note, soft_wrap=True)
    for layout, obstacle in facts["layouts"].items():
        console.print(f"layout {layout}: {'no: ' + obstacle if obstacle else 'yes'}", markup=False, soft_wrap=True)
    for one in facts["training"]:
        memory = one["memory_bytes_estimated"]
        console.print(
            f"{one['stage']}: {one['duration']} updates; about {_bytes(memory['total'])} on {facts['device']}"
            f" (estimated: weights {_bytes(memory['weights'])}, trained {_bytes(memory['trained'])}, activations"
            f" {_bytes(memory['activations'])})",
            soft_wrap=True,
        )
        if one["tokens_at_most"] is not None:
            console.print(
                f"  at most {one['tokens_at_most']:,} tokens and {one['flops_at_most']:.2e} FLOPs: about"
                f" {_time(one['seconds_estimated'])} at this machine's matrix-product rate (estimated; real steps take"
                " longer)",
                soft_wrap=True,
            )


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
