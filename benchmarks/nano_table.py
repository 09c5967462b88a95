"""Dense, magnitude, gate-Taylor and Compresso on the nano model: kept shares x seeds, equal updates, fresh items.

    python benchmarks/nano_table.py [--keep 0.7 0.5 0.3] [--seeds 0 1 2] [--items 300] [--ablations]

Every run goes through `compresso.run` and is measured on the checkpoint reopened from disk. Finished runs are kept as
lines of results/nano_runs.jsonl and not repeated; the table is results/nano_table.json and results/nano_table.md. Items
and documents come from a seed that neither training, nor the demo, nor any choice of knobs has seen. `--ablations`
turns one knob of the default recipe at a time.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, machine
from compresso.data import nano, world
from compresso.loading import load
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.perplexity import every_token, perplexity
from compresso.runner.recipe import override, read, with_knob
from compresso.runner.run import run

RECIPES = {"magnitude": "magnitude-structured/nano", "gate-Taylor": "gate-taylor/nano", "Compresso": "compresso/nano"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "Lagrangian instead of projection": {"constraint": "lagrangian", "cost_aware": False, "ramp": 30, "hold": 30},
    "gates not charged for their cost": {"cost_aware": False},
    "open start instead of scores": {"start": "open", "ramp": 30, "hold": 30},
    "narrow start (spread 1.5)": {"score_spread": 1.5},
    "noise per batch instead of per example": {"noise": "batch"},
    "soft survivors instead of hard": {"finish": "soft"},
    "hidden dimensions too": {"kinds": ["head", "channel", "hidden"]},
    "equal widths in all layers": {"layout": "uniform"},
    "gates not trained (rate 0)": {"mask_lr": 0.0},
}
FRESH = 31_415_926
DOCUMENTS = 400


def measure(folder: Path, items: int) -> dict[str, Any]:
    """Accuracy by task, their mean, and perplexity of a checkpoint, in float32."""
    loaded = load(folder, dtype=torch.float32)
    assert loaded.tokenizer is not None
    accuracy = choice_accuracy(
        loaded.model, loaded.tokenizer, [item for task in world.TASKS for item in world.items(task, items, FRESH)]
    )
    protocol = every_token("world", "fresh", 256)
    return {
        "accuracy": accuracy.accuracy,
        "stderr": accuracy.stderr,
        "tasks": accuracy.tasks,
        "perplexity": (
            perplexity(loaded.model, loaded.tokenizer, world.documents(DOCUMENTS, FRESH), protocol, batch_size=16).value
        ),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
    }


def one_run(name: str, raw: dict[str, Any], keep: float, seed: int, items: int) -> dict[str, Any]:
    """Run a recipe and measure what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        records = run(with_knob(raw, "keep", keep), nano.path(), "world", output=folder, seed=seed, quiet=True).records
        blocks = records["after"]["parameters"]["blocks"] / records["before"]["parameters"]["blocks"]
        updates = {stage: facts.get("updates") for stage, facts in records["stages"].items()}
        row = {
            "name": name,
            "keep": keep,
            "seed": seed,
            "items": items,
            "kept_blocks": blocks,
            "updates": updates,
            "seconds": records["seconds"],
        }
        return row | measure(folder, items)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    log = RESULTS / ("nano_ablations.jsonl" if given.ablations else "nano_runs.jsonl")
    plan: list[tuple[str, dict[str, Any], float, int]] = []
    for keep in given.keep:
        for seed in given.seeds:
            if given.ablations:
                for name, knobs in ABLATIONS.items():
                    raw = read("compresso/nano")
                    for knob, value in knobs.items():
                        raw = override(raw, f"stages.learn_gates.{knob}", value)
                    plan.append((name, raw, keep, seed))
            else:
                plan += [(name, read(RECIPES[name]), keep, seed) for name in given.recipes]
    if not given.ablations and not any(row["name"] == "dense" for row in rows_of(log)):
        append(
            log,
            {"name": "dense", "keep": 1.0, "seed": 0, "items": given.items, "kept_blocks": 1.0}
            | measure(nano.path(), given.items),
        )
    for name, raw, keep, seed in plan:
        if any((row["name"], row["keep"], row["seed"]) == (name, keep, seed) for row in rows_of(log)):
            continue
        row = one_run(name, raw, keep, seed, given.items)
        append(log, row)
        print(
            f"{name} keep {keep} seed {seed}: accuracy {row['accuracy']:.3f}, perplexity {row['perplexity']:.3f}",
            flush=True,
        )
    write_table(rows_of(log), "nano_ablations" if given.ablations else "nano_table")


def rows_of(log: Path) -> list[dict[str, Any]]:
    """All finished runs, one for each name, share and seed."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return list({(row["name"], row["keep"], row["seed"]): row for row in rows}.values())


def append(log: Path, row: dict[str, Any]) -> None:
    """Add a finished run."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_table(rows: list[dict[str, Any]], name: str = "nano_table") -> None:
    """Means and standard deviations over seeds, as results/NAME.json and results/NAME.md."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["keep"], row["name"]), []).append(row)
    table = []
    for (keep, method), members in sorted(groups.items(), key=lambda pair: (-pair[0][0], list(groups).index(pair[0]))):
        accuracies, perplexities = [row["accuracy"] for row in members], [row["perplexity"] for row in members]
        table.append(
            {
                "keep": keep,
                "name": method,
                "seeds": len(members),
                "items": members[0]["items"],
                "accuracy": round(statistics.mean(accuracies), 4),
                "accuracy_sd": round(statistics.stdev(accuracies), 4) if len(members) > 1 else None,
                "perplexity": round(statistics.mean(perplexities), 3),
                "perplexity_sd": round(statistics.stdev(perplexities), 3) if len(members) > 1 else None,
                "kept_blocks": [round(row["kept_blocks"], 5) for row in members],
                "parameters": members[0]["parameters"],
                "updates": members[0].get("updates"),
            }
        )
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": table, "machine": machine()}, indent=2) + "\n", "utf-8")
    lines = ["| blocks kept | method | accuracy | perplexity | parameters | seeds |", "|---|---|---|---|---|---|"]
    for row in table:
        spread = [f" ± {row[key]}" if row[key] is not None else "" for key in ("accuracy_sd", "perplexity_sd")]
        lines.append(
            f"| {row['keep']:.0%} | {row['name']} | {row['accuracy']:.3f}{spread[0]} |"
            f" {row['perplexity']:.3f}{spread[1]} | {row['parameters']:,} | {row['seeds']} |"
        )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
