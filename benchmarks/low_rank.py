"""Low rank on a real model: what plain and whitened truncation cost in perplexity, and what the factors are worth in
time and bytes against the dense model, timed in turns in one process.

    COMPRESSO_DATA=folder python benchmarks/low_rank.py MODEL --scratch FOLDER [--keeps 0.9 0.8 0.6] [--examples 64]
        [--windows 40] [--rounds 5] [--threads 1]
    python benchmarks/low_rank.py --report

`keep` is the share of its numbers that both factors of a linear have together; embeddings stay whole. Calibrated on
windows of 512 tokens of the RedPajama sample, scored on WikiText-2 and the C4 sample, no training, float32. Each result
is exported as low-rank and opened by transformers; timed are that and the dense model. A finished row is a line of
results/low_rank.jsonl.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import compresso
from common import RESULTS, machine
from compresso.metrics.latency import speed_measurements
from equal_updates import LENGTH, scored
from real_model import SCORED, TEXT

LINES = RESULTS / "low_rank.jsonl"


def rows() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in LINES.read_text("utf-8").splitlines()] if LINES.exists() else []


def truncated(whiten: str, keep: float, root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One row: truncate, score, export, time."""
    folder = given.scratch / f"{whiten}-{keep}"
    recipe = {
        "name": "svd",
        "data": {"source": "alpaca-gpt4", "max_length": LENGTH, "prompt": False, "pack": True},
        "stages": [{"svd": {"keep": keep, "whiten": whiten, "calibration": {"examples": given.examples, "batch": 1}}}],
    }
    result = compresso.run(
        recipe, given.model, root / TEXT, output=folder, measure="none", allow_collapsed=True, overwrite=True
    )
    noted = result.records["stages"]["svd"]
    found = {"found": scored(str(folder), root, given.windows), "seconds": noted["seconds"]}
    small = folder.with_name(f"{folder.name}-low-rank")
    told = compresso.export(folder, small, format="low-rank", dtype="f32", overwrite=True)
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("dense", given.model), ("low rank", small))
    }
    speeds = speed_measurements(models, batches=(1,), prompt_tokens=LENGTH, new_tokens=32, rounds=given.rounds)
    values = {one.name.removesuffix("/batch1"): (one.value, one.low, one.high) for one in speeds["low rank"]}
    numbers = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    return found | {"speed": values, "numbers": numbers, "bytes": told["bytes"]}


def report() -> None:
    """Write results/low_rank.md."""
    done = rows()
    where = f"{done[-1]['machine']['processor']}, {done[-1]['machine']['threads']} thread(s)"
    text = [
        "# Low rank on a real model, without training",
        "",
        f"SmolLM2-135M-Instruct, float32; perplexity ± one standard error over windows; {where}. Speed-ups over dense"
        f" are medians of rounds in turns, with the extremes: prefill of {LENGTH} tokens, then 32 more, batch 1. See"
        " `benchmarks/low_rank.py`.",
        "",
        "| truncation | share kept | numbers, millions | WikiText-2 | C4 sample | prefill | decode |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in sorted(done, key=lambda line: (-line["keep"], line["whiten"])):
        scores = [
            f"{line['found'][name]['value']:,.1f} ± {line['found'][name]['value'] * line['found'][name]['stderr']:,.1f}"
            for name in SCORED
        ]
        numbers = line["numbers"]["low rank" if "low rank" in line["numbers"] else "dense"] / 1e6
        speeds = [
            f"{value:.2f} ({low:.2f} to {high:.2f})"
            for value, low, high in (
                line["speed"].get(f"{what}_speedup", (1.0, 1.0, 1.0)) for what in ("prefill", "decode")
            )
        ]
        text.append(
            f"| {line['whiten']} | {line['keep']:g} | {numbers:.1f} | {' | '.join(scores)} | {' | '.join(speeds)} |"
        )
    (RESULTS / "low_rank.md").write_text("\n".join([*text, ""]), "utf-8")


def main() -> None:
    """Do what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.9, 0.6])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.report:
        root = Path(os.environ["COMPRESSO_DATA"])
        given.scratch.mkdir(parents=True, exist_ok=True)
        where = {key: value for key, value in machine().items() if key != "load_before"}
        for whiten, keep in [("dense", 1.0), *((how, keep) for keep in given.keeps for how in ("activations", "none"))]:
            if any((line["whiten"], line["keep"]) == (whiten, keep) for line in rows()):
                continue
            if whiten == "dense":
                model = AutoModelForCausalLM.from_pretrained(given.model)
                numbers = {"dense": sum(one.numel() for one in model.parameters())}
                row = {"found": scored(given.model, root, given.windows), "numbers": numbers, "speed": {}}
            else:
                row = truncated(whiten, keep, root, given)
            with LINES.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"whiten": whiten, "keep": keep, **row, "machine": where}) + "\n")
            print(whiten, keep, row, flush=True)
    report()


if __name__ == "__main__":
    main()
