"""A ViT without 30 and 50 % of its blocks, untrained, trained by labels, and taught by the dense model.

    python benchmarks/vit_prune.py --scratch FOLDER [--seeds 0 1 2] [--threads 1]
    python benchmarks/vit_prune.py --report

The dense model is that of `vit_bits.py`: a small ViT, trained on CIFAR-10 pictures from random numbers. Each cell is
scored once on pictures that nobody trained on, and is a line of results/vit_prune.jsonl.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from common import high_water_mib, machine
from compresso.core.cost import CostModel
from compresso.core.row import Row
from encoders import packed, ready, run
from vit_bits import SEEN, SIZES, TASK, TUNED, VISION, Trained, pictures, trained
from vit_prune_report import CELLS, LINES, Cell, lines, report

PRUNED: dict[str, Any] = {"batches": 16, "batch": 64, "micro_batch": 64}
DEEP = 50
"""Percent from which on layers leave, too: a ViT's config cannot say that heads are gone, and FFNs are half of it."""
LATER: dict[str, Any] = {"steps": 150, "batch": 64, "micro_batch": 64, "lr": 1e-3, "lr_schedule": "linear"}
TAUGHT: dict[str, Any] = {"temperature": 2.0, "hard_weight": 1.0}


def recipe(cell: Cell) -> list[dict[str, Any]]:
    """The stages of a cell."""
    stages: list[dict[str, Any]] = []
    kinds = ["layer", "channel"] if cell.gone >= DEEP else ["channel"]
    if cell.gone:
        stages.append({"gate_taylor": {"keep": 1 - cell.gone / 100, "kinds": kinds, **PRUNED}})
    if cell.trained:
        shared = {"train": "all", "save_every": TUNED["save_every"], **LATER}
        stages.append({"distill": {**shared, **TAUGHT}} if cell.taught else {"recover": shared})
    return stages


def measured(vit: Trained, rows: list[Row], seed: int, cell: Cell) -> dict[str, Any]:
    """One row of the table."""
    begun = time.process_time()
    stages = recipe(cell)
    made = ready(  # what has no stage is read as a recipe for another
        {"name": "cell", "stages": stages or recipe(CELLS["dense on"])},
        str(vit.folder),
        vit.data,
        TASK,
        (),
        vit.scratch,
    )
    job = made.job(seed)
    for name in [name for one in stages for name in one]:
        job = run(made.stages[name], job)
    score: Any = job.task.score(job.model.eval(), rows)  # a classification's
    counted = CostModel(job.arch.axes(job.model), job.arch.weights(job.model))()
    return {
        "accuracy": score.accuracy,
        "n": len(score.right),
        "guess": score.guess,
        "right": packed(score.right),
        "parameters": int(counted.total),
        "macs": int(counted.macs),
        "kept_share_of_blocks": job.records.get("gate_taylor", {}).get("kept_share_of_blocks", 1.0),
        "cpu_s": round(time.process_time() - begun, 1),
    }


def main() -> None:
    """Do what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.report:
        root = Path(os.environ["COMPRESSO_DATA"]) / VISION
        given.scratch.mkdir(parents=True, exist_ok=True)
        for seed in given.seeds:
            known = {line["cell"] for line in lines() if line["seed"] == seed}
            if not (missing := [name for name in CELLS if name not in known]):
                continue
            vit = trained(given.scratch, root / "cifar10_train_10000.parquet", seed)
            rows = pictures(vit, root / "cifar10_test_2000.parquet")
            for name in missing:
                how = {**SIZES, **SEEN, **{key: TUNED[key] for key in ("steps", "batch", "lr")}}
                line = {"seed": seed, "cell": name, "how": how, "pruned": PRUNED, "later": {**LATER, **TAUGHT}}
                line |= measured(vit, rows, seed, CELLS[name])
                where = {key: value for key, value in machine().items() if key != "load_before"}
                with LINES.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "peak_mib": round(high_water_mib()), "machine": where}) + "\n")
                print(json.dumps({key: value for key, value in line.items() if key != "right"}), flush=True)
    report()


if __name__ == "__main__":
    main()
