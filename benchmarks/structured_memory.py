"""Memory and time of every structured method on a processor: pruning and 20 updates in all, at 70 % of the blocks.

    python benchmarks/structured_memory.py [--updates 20]

Beside `structured.py`, whose memory and seconds are those of a GPU and lack the methods that did not run there. Each
job is a process of its own with one thread. Memory is the kernel's high-water mark over what the process held with data
and dense model loaded; seconds are the processor's, so that other work on the machine changes them little. Writes
results/structured_memory.json.
"""

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from common import high_water_mib, machine, write
from compresso.checkpoint.load import load_model
from compresso.edit.stock import as_stock
from compresso.runner.first_job import new_job
from compresso.runner.recipe import build
from structured import prepared
from structured_cases import METHODS, cases, recipe_of

KEEP = 0.7


def cost(task: tuple[str, str, int]) -> tuple[float, float]:
    """MiB over the loaded model, and processor seconds."""
    case_name, method, updates = task
    torch.set_num_threads(1)
    base = prepared(case_name, "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        job = new_job(base, Path(scratch), quiet=True)
        job = replace(job, model=as_stock(load_model(base.source, dtype=torch.float32)))
        recipe = build(recipe_of(cases()[case_name], METHODS[method], KEEP, updates), method)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is held now
        held, begun = high_water_mib(), time.process_time()
        for name, stage in recipe.stages:
            job = stage(replace(job, out=Path(scratch, name)))
        return round(high_water_mib() - held, 1), round(time.process_time() - begun, 1)


def main() -> None:
    """Measure all, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    given = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case_name in cases():
        for method in METHODS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                mib, seconds = pool.apply(cost, ((case_name, method, given.updates),))
            found.setdefault(case_name, {})[method] = {"mib": mib, "seconds": seconds}
            print(f"{case_name} {method}: {mib:.0f} MiB, {seconds:.1f} s", flush=True)
    what = (
        f"{given.updates} updates in all at {KEEP:.0%} of the blocks, one thread: MiB over the loaded model, processor"
        " seconds"
    )
    write("structured_memory", {"what": what, "cost": found, "machine": machine()})


if __name__ == "__main__":
    main()
