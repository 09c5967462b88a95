"""The main job on the embedded model, offline: prune, recover, reload, compare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compresso.checkpoint.atomic import check_output, new_folder
from compresso.data import nano, world
from compresso.loading import Loaded, load
from compresso.measure.choices import choice_accuracy
from compresso.measure.latency import speed_measurements
from compresso.measure.perplexity import every_token, perplexity
from compresso.recipe import read, with_knob
from compresso.run import run

RECIPES = {"magnitude": "magnitude-structured/nano", "gate-Taylor": "gate-taylor/nano", "Compresso": "compresso/nano"}
"""Recipes compared, all with the same number of updates in all."""
ITEMS_PER_TASK = 60
DOCUMENTS = 200
FRESH = 7_000_000
"""Seed of the demo's items and documents: not the seed of training or of the model's own scores."""


def run_demo(output: Path, *, keep: float = 0.7, force: bool = False, seed: int = 0) -> dict[str, Any]:
    """Prune the nano model by three recipes, measure all of them against the dense model and print the table.

    Args:
        output: becomes a folder with one checkpoint a recipe and `table.json`.
        keep: share of block parameters that stays.
        force: replace an existing output.
        seed: of the recipes.

    Returns:
        What table.json holds: rows by name.

    Raises:
        CompressoError: as `run` does.
    """
    console = Console()
    check_output(output, nano.path(), force)
    with new_folder(output, force) as folder:
        loaded = {"dense": load(nano.path(), dtype=torch.float32)}
        records: dict[str, Mapping[str, Any]] = {}
        for name, recipe in RECIPES.items():
            console.print(f"[bold]{name}[/bold]: recipe {recipe}, {keep:.0%} of the blocks stay")
            raw = with_knob(read(recipe), "keep", keep)
            target = folder / name.lower()
            records[name] = run(raw, nano.path(), "world", output=target, seed=seed).records
            loaded[name] = load(target, dtype=torch.float32)
        table = measured(loaded, records)
        (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    _print(console, table, keep)
    best = output / "compresso"
    console.print(f"\nThe pruned checkpoint: [bold]{best}[/bold]. Load it:\n")
    console.print("    import compresso")
    console.print(f'    model = compresso.load("{best}")')
    console.print('    print(model.generate("What does a thitem eat?"))\n')
    console.print(
        "or, after `import compresso`, with AutoModelForCausalLM.from_pretrained; without compresso, with trust_remote_code=True."
    )
    return table


def measured(models: Mapping[str, Loaded], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters, bytes, perplexity, accuracy and decode speed of each model, on items and documents that none was trained on."""
    items = [item for task in world.TASKS for item in world.items(task, ITEMS_PER_TASK, FRESH)]
    texts = list(world.documents(DOCUMENTS, FRESH))
    live = {name: one.model for name, one in models.items()}
    speeds = speed_measurements(live, batches=(1,), prompt_tokens=32, new_tokens=48)
    rows: dict[str, Any] = {}
    for name, one in models.items():
        assert one.tokenizer is not None
        choices = choice_accuracy(one.model, one.tokenizer, items)
        language = perplexity(one.model, one.tokenizer, texts, every_token("world", "fresh", 256), batch_size=16)
        rows[name] = {
            "parameters": sum(p.numel() for p in one.model.parameters()),
            "block_parameters": records[name]["after"]["parameters"]["blocks"] if name in records else None,
            "bytes": records[name]["bytes"] if name in records else (nano.path() / "model.safetensors").stat().st_size,
            "perplexity": language.value,
            "accuracy": choices.accuracy,
            "accuracy_stderr": choices.stderr,
            "items": choices.n,
            "speed": {one.name: one.model_dump(mode="json") for one in speeds[name]},
            "seconds": records[name]["seconds"] if name in records else None,
        }
    return rows


def _print(console: Console, rows: Mapping[str, Any], keep: float) -> None:
    table = Table(title=f"nano on fresh items, {keep:.0%} of block parameters kept, equal training", title_justify="left")
    for column in ("", "parameters", "MB on disk", "perplexity", "accuracy", "decode tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        speed = row["speed"]["decode/batch1"]
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['accuracy']:.3f} ± {row['accuracy_stderr']:.3f}",
            f"{speed['value']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
        )
    console.print(table)
