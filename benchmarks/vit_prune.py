"""A ViT without 30 and 50 % of its blocks, untrained, trained by labels, and taught by the dense model.

    python benchmarks/vit_prune.py --scratch FOLDER [--seeds 0 1 2] [--threads 1]
    python benchmarks/vit_prune.py --report

The dense model is that of `vit_bits.py`: a small ViT, trained on CIFAR-10 pictures from random numbers. Each cell is
scored once on pictures that nobody trained on, and is a line of results/vit_prune.jsonl.
"""

import time
from typing import Any

from compresso.core.cost import CostModel
from compresso.core.row import Row
from encoders import packed, ready, run
from vit_bits import TASK, TUNED, Trained, do
from vit_prune_report import CELLS, LINES, Cell, report

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


def measured(vit: Trained, rows: list[Row], seed: int, name: str) -> dict[str, Any]:
    """One row of the table."""
    begun = time.process_time()
    stages = recipe(CELLS[name])
    made = ready(  # what has no stage is read as a recipe for another
        {"name": "cell", "stages": stages or recipe(CELLS["dense on"])},
        str(vit.folder),
        vit.data,
        TASK,
        (),
        vit.scratch,
    )
    job = made.job(seed)
    for stage in [stage for one in stages for stage in one]:
        job = run(made.stages[stage], job)
    score: Any = job.task.score(job.model.eval(), rows)  # a classification's
    counted = CostModel(job.arch.axes(job.model), job.arch.weights(job.model))()
    return {
        "pruned": PRUNED,
        "later": {**LATER, **TAUGHT},
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
    do(__doc__, LINES, CELLS, measured)
    report()


if __name__ == "__main__":
    main()
