"""Predicted against measured time of models that runs deliver: is a table of modules worth a budget?

    python benchmarks/latency.py MODEL [--engine torch] [--context 512] [--threads 1] [--quick]

A table is measured as `compresso latency` does. Then models are pruned without training, by several methods and to
several sizes, reopened from their folders and timed in turn beside the dense model. Wanted: predicted within 10 % of
measured. Run it on an idle machine: the results say what load there was before.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import compresso
from common import RESULTS, machine, write
from compresso.checkpoint.source import open_source
from compresso.core.latency_table import LatencyTable
from compresso.core.plan import Plan
from compresso.engines.file_times import TIMERS
from compresso.metrics.forwards import timed_forwards
from compresso.runner.budgeted_time import predicted

WITHIN = 0.10
STAGES: Mapping[str, dict[str, Any]] = {
    "magnitude, equal widths": {"magnitude_structured": {}},
    "gate-Taylor, widths per layer": {"gate_taylor": {"batches": 1, "batch": 4}},
    "last layers": {"drop_layers": {"score": "reverse"}},
    "last attentions": {"drop_layers": {"score": "reverse", "kinds": ["attention"]}},
}
KEEPS = (0.8, 0.5)


def delivered(model: str, scratch: Path, quick: bool) -> dict[str, tuple[Path, Plan]]:
    """Name -> folder and plan of each pruned model."""
    found: dict[str, tuple[Path, Plan]] = {}
    for name, stage in list(STAGES.items())[:: 2 if quick else 1]:
        for keep in KEEPS[:1] if quick else KEEPS:
            at = 0.8 if "attentions" in name else keep
            label = f"{name}, {at:.0%} of blocks"
            if label in found:
                continue
            knobs = {key: {**value, "keep": at} for key, value in stage.items()}
            data = {"source": "world", "limit": 64, "held": 0, "prompt": False}
            raw = {"name": "cut", "data": data, "stages": [knobs]}
            if "magnitude_structured" in stage:
                raw.pop("data")
            folder = scratch / str(len(found))
            done = compresso.run(raw, model, output=folder, measure="none", allow_collapsed=True, quiet=True)
            found[label] = folder, done.plan
    return found


def timed(table: LatencyTable, folders: Mapping[str, Path], scratch: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a forward of each delivered model, as the table was measured."""
    conditions = table.conditions
    engine = conditions.engine
    dtype = getattr(torch, conditions.dtype) if engine == "torch" else torch.float32
    models, tokenizers = {}, {}
    for name, folder in folders.items():
        loaded = compresso.load(folder, dtype=dtype)
        models[name], tokenizers[name] = loaded.model, loaded.tokenizer
    if engine == "torch":
        return {name: median(times) for name, times in timed_forwards(models, conditions, rounds).items()}
    timer = TIMERS[engine]
    paths = [scratch / f"export{number}{timer.suffix}" for number in range(len(models))]
    for (name, model), path in zip(models.items(), paths, strict=True):
        timer.write(model, tokenizers[name], path, conditions.dtype)
    vocabulary = min(int(model.config.vocab_size) for model in models.values())
    times = timer.times(paths, conditions, rounds, torch.get_num_threads(), vocabulary)
    return {name: median(one) for name, one in zip(models, times, strict=True)}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--phase", default="decode")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two models, few rounds, nothing stored")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts, rounds = machine(), 3 if given.quick else given.rounds
    options: dict[str, Any] = {"engine": given.engine, "phase": given.phase, "context": given.context}
    table = compresso.latency(given.model, **options, rounds=rounds, levels=3 if given.quick else 6)
    source = open_source(given.model)
    assert source.folder is not None  # it was just timed
    with tempfile.TemporaryDirectory() as scratch:
        cut = delivered(given.model, Path(scratch), given.quick)
        folders = {"dense": source.folder, **{name: folder for name, (folder, _) in cut.items()}}
        plans = {"dense": Plan(), **{name: plan for name, (_, plan) in cut.items()}}
        measured = timed(table, folders, Path(scratch), rounds)
    rows: list[dict[str, Any]] = []
    for name, ms in measured.items():
        told = predicted(table, source, plans[name])[1].value
        speedups = measured["dense"] / ms, predicted(table, source, Plan())[1].value / told
        rows.append(
            {
                "model": name,
                "predicted_ms": round(told, 3),
                "measured_ms": round(ms, 3),
                "error": round(told / ms - 1, 4),
                "predicted_speedup": round(speedups[1], 3),
                "measured_speedup": round(speedups[0], 3),
            }
        )
        print(rows[-1], flush=True)
    worst = max(abs(row["error"]) for row in rows)
    print(f"worst error {worst:.1%}, wanted at most {WITHIN:.0%}: {'met' if worst <= WITHIN else 'missed'}")
    if given.quick:
        return
    name = "latency" if given.engine == "torch" else f"latency_{given.engine.replace('.', '')}"
    command = f"python benchmarks/latency.py MODEL --engine {given.engine} --phase {given.phase}"
    command += f" --context {given.context} --rounds {rounds} --threads {given.threads}"
    stored = {
        "what": f"predicted against measured milliseconds of a forward: {table.conditions.words}",
        "model": source.name,
        "rows": rows,
        "worst_error": worst,
        "wanted": WITHIN,
        "table": table.to_dict(),
        "machine": facts,
        "command": command,
    }
    write(name, stored)
    (RESULTS / f"{name}.md").write_text(page(stored), "utf-8")


def page(stored: Mapping[str, Any]) -> str:
    """The results as a page."""
    facts = stored["machine"]
    lines = [
        "# Predicted and measured time",
        "",
        f"{stored['what']}; {stored['model']}, pruned without training and reopened from disk. {facts['processor']},"
        f" {facts['threads']} threads, load {facts['load_before']} before; `{stored['command']}`.",
        "",
        "| model | predicted ms | measured ms | error | predicted speed-up | measured speed-up |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['predicted_ms']:.4g} | {row['measured_ms']:.4g} | {row['error']:+.1%} |"
        f" {row['predicted_speedup']:.2f} | {row['measured_speedup']:.2f} |"
        for row in stored["rows"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return "\n".join([*lines, "", f"Worst error {stored['worst_error']:.1%}. {versions}.", ""])


if __name__ == "__main__":
    main()
