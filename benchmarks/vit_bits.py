"""8, 6 and 4 bits of a ViT, rounded and not trained for it, by the quantisers of the encoders.

    python benchmarks/vit_bits.py --scratch FOLDER [--seeds 0 1 2] [--threads 1]
    python benchmarks/vit_bits.py --report

No pretrained weights of a vision model are at hand: a small ViT is trained here on CIFAR-10 pictures, a seed each, from
random numbers (`finetune`). What it knows is little; what rounding takes of it is what is asked. Its weights and the
inputs of its linears are then rounded by the stage `qat` without updates, and pictures that nobody trained on are
scored once a cell. A finished cell is a line of results/vit_bits.jsonl.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTModel

from compresso.checkpoint.load import load_model
from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import open_source
from compresso.core.row import Row
from compresso.data.registry import load_records
from compresso.edit.stock import as_stock
from compresso.tasks.base import Reading
from encoders import Ready, packed, ready, run
from kept import asked, here, keep, missing, options
from vit_bits_report import CELLS, LINES, report

VISION = "datasets/vision"
SIZES: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
SEEN: dict[str, Any] = {"image_size": 32, "patch_size": 4}
TUNED: dict[str, Any] = {"steps": 400, "batch": 64, "micro_batch": 64, "lr": 2e-3, "save_every": 10_000}
TASK = "image-classification"


@dataclass
class Trained:
    """A ViT of one seed, how a recipe is prepared for it, and the pictures that it is scored on."""

    folder: Path
    scratch: Path
    data: Path

    def ready(self, knobs: dict[str, Any]) -> Ready:
        """The stage `qat` with these knobs, for the trained model."""
        return ready(
            {"name": "rounding", "stages": [{"qat": knobs}]}, str(self.folder), self.data, TASK, (), self.scratch
        )

    def model(self) -> PreTrainedModel:
        """Its weights, read anew."""
        return as_stock(load_model(open_source(self.folder), dtype=torch.float32, device=torch.device("cpu")))


Measured = Callable[[Trained, list[Row], int, str], dict[str, Any]]
"""The numbers of a cell: of a trained model, the pictures it is scored on, the seed and the cell's name."""


def base(scratch: Path, seed: int) -> Path:
    """The folder of a ViT of random numbers, which says how it sees."""
    folder = scratch / f"base-{seed}"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ViTModel(ViTConfig(**SIZES, **SEEN, hidden_dropout_prob=0.0))
        model.save_pretrained(folder)
        fields = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(fields), "utf-8")
    return folder


def trained(scratch: Path, data: Path, seed: int) -> Trained:
    """The ViT of a seed, trained if its folder is not there."""
    folder = scratch / f"vit-{seed}"
    if not folder.exists():
        begun = base(scratch, seed)
        raw = {"name": "training", "stages": [{"finetune": TUNED}]}
        made = ready(raw, str(begun), data, TASK, (), scratch)
        job = run(made.stages["finetune"], made.job(seed))
        job.model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_bytes((begun / "preprocessor_config.json").read_bytes())
    return Trained(folder, scratch, data)


def pictures(vit: Trained, file: Path) -> list[Row]:
    """The pictures of a file as the model sees them."""
    source = open_source(vit.folder)
    task = vit.ready({"steps": 0}).prepared.recipe.task
    reading = Reading(0, pixels=pixel_input(source))
    return list(task.encode(load_records(file, form=task.form), None, reading, source.config).rows)


def cell(vit: Trained, rows: list[Row], seed: int, name: str) -> dict[str, Any]:
    """One number of the table: which pictures were right, and how far the logits moved."""
    begun, knobs = time.process_time(), CELLS[name][1]
    made = vit.ready({"steps": 0, **(knobs or {})})
    job = made.job(seed)
    if knobs is not None:
        job = run(made.stages["qat"], job)
    score: Any = job.task.score(job.model.eval(), rows)  # a classification's
    near = [job.collated(rows[at : at + 100]) for at in range(0, 500, 100)]
    moved = _moved(job.model, vit.model().eval(), near)
    seconds = round(time.process_time() - begun, 1)
    facts = {"accuracy": score.accuracy, "n": len(score.right), "guess": score.guess, "right": packed(score.right)}
    return {**facts, "moved": moved, "parameters": job.model.num_parameters(), "cpu_s": seconds}


@torch.inference_mode()
def _moved(ours: PreTrainedModel, whole: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """The logits' distance from the whole model's, relative to how large these are."""
    pairs = [
        [model(pixel_values=batch["pixel_values"]).logits.double() for batch in batches] for model in (ours, whole)
    ]
    one, other = (torch.cat(pair) for pair in pairs)
    return float((one - other).norm() / other.norm())


@lru_cache(1)
def _looking(scratch: Path, seed: int) -> tuple[Trained, list[Row]]:
    """The ViT of a seed, and the pictures that it is scored on."""
    root = Path(os.environ["COMPRESSO_DATA"]) / VISION
    vit = trained(scratch, root / "cifar10_train_10000.parquet", seed)
    return vit, pictures(vit, root / "cifar10_test_2000.parquet")


def do(about: str | None, file: Path, cells: Iterable[str], measured: Measured) -> None:
    """The cells of a file that are missing, of each seed that the command line names."""
    parser = options(about)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = asked(parser)
    if given.report:
        return
    how = {**SIZES, **SEEN, **{key: TUNED[key] for key in ("steps", "batch", "lr")}}
    for seed, name in missing(file, ("seed", "cell"), product(given.seeds, cells)):
        found = measured(*_looking(given.scratch, seed), seed, name)
        keep(file, {"seed": seed, "cell": name, "how": how, **found, **here()}, hidden=("right",))


def main() -> None:
    """Do what is missing, and write the table."""
    do(__doc__, LINES, CELLS, cell)
    report()


if __name__ == "__main__":
    main()
