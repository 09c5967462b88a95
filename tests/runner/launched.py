"""Runs of recipes in each of the launched processes: `launched.py FOLDER MODEL DATA JOB`, a JSON of recipes by name.

A name that ends in " killed" kills the main process while its second block is journalled, or its second checkpoint of a
training is written; one that ends in " resumed" goes on with the output of that name; one that ends in " offloaded"
leaves the weights on disk.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import compresso
from compresso.runner import output
from compresso.sweep.journal import Journal
from compresso.training.checkpoint import Saved, TrainingCheckpoints


def run(name: str, recipe: Sequence[Mapping[str, Any]], folder: Path, model: str, data: str) -> None:
    """One recipe, into a folder of its name."""
    stem, resume = name.removesuffix(" resumed").removesuffix(" killed"), name.endswith(" resumed")
    raw = {"name": stem, "data": {"held": 4, "prompt": False, "pack": False, "limit": 40}, "stages": recipe}
    compresso.run(
        raw,
        model,
        data,
        output=folder / stem,
        resume=resume,
        offload=name.endswith(" offloaded"),
        quiet=True,
        measure="none",
        allow_collapsed=True,
    )


def main() -> None:
    """All of them."""
    warnings.simplefilter("ignore")
    folder, model, data = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    output.reopen_and_compare = lambda *_, **__: 0.0  # one test goes the long way
    written, saved = Journal.write, TrainingCheckpoints.save

    def dies(self: Journal, layer: int, *rest: Any) -> None:
        written(self, layer, *rest)
        if layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def dies_trained(self: TrainingCheckpoints, state: Saved) -> Path:
        path = saved(self, state)
        if state.update == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    for name, recipe in json.loads(sys.argv[4]).items():
        Journal.write = dies if name.endswith(" killed") else written  # type: ignore[method-assign]
        TrainingCheckpoints.save = dies_trained if name.endswith(" killed") else saved  # type: ignore[method-assign]
        run(name, recipe, folder, model, data)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
