"""A segmenter for a small board: a student alone and taught, a dense model pruned by rows' norms and by gates, with a
teacher and without, and what of each runs in ONNX Runtime in fp32, fp16 and int8 under 4 GB.

    python benchmarks/segmenter.py --scratch FOLDER [--only GLOB] [--threads 1]
    python benchmarks/segmenter.py --report

Pictures are CamVid's at 80 x 60, 11 classes (what has none is passed over). No pretrained weights of a vision model are
at hand, and one seed on a CPU is all there was time for, so the dense model is MobileViT-small with DeepLabV3's head
from random numbers in a few hundred updates: it knows little, and every row is shortened in the same way.

    dense        MobileViT-small, trained by the labels (`finetune`); it is the teacher of all that is taught
    half         the same network with half of its widths, from random numbers
    l2 N         the dense model without N % of the channels of each layer, those of smallest norm (`filter_pruning`)
    gates        the dense model with as many block parameters as `l2 50`: gates learned for half of the updates
    taylor       the same count, by one pass of gradients (`gate_taylor`)

`taught` minimises OHEM and the squared difference of logits from the dense model's (`distill`), `alone` OHEM by itself
(`recover` of all weights); both take as many updates, at the same rate, of the same pictures. Scored once on the test
part, which chooses nothing. A finished cell is a line of results/segmenter.jsonl, a measured file one more.
"""

import json
import os
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.row import Row
from compresso.core.segments import at_labels, confusion, intersection_over_union
from compresso.data.registry import load_records
from compresso.engines.encoder import encoder_logits, encoder_reference
from compresso.engines.onnx_runtime import OnnxEngine
from compresso.engines.pictures import RUNTIMES, looked_at
from compresso.formats.onnx import GRAPH
from compresso.formats.onnx_encoder import save_onnx_encoder
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.learn_gates import LearnGates
from compresso.runner.drawn import begin_norms_
from compresso.stage import Stage
from compresso.tasks.base import Reading
from encoders import Ready, ready, run, taught_by
from kept import asked, here, keep, missing, options, stored
from segmenter_report import CALIBRATED, CELLS, FILES, LINES, Cell, report

VISION, TASK = "datasets/vision", "segmentation"
NAMES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
NO_CLASS = 11
SEEN: dict[str, Any] = {"image_size": [60, 80], "output_stride": 8, "num_attention_heads": 2}
SMALL: dict[str, Any] = {}
HALF: dict[str, Any] = {
    "hidden_sizes": [72, 96, 120],
    "neck_hidden_sizes": [8, 16, 32, 48, 64, 80, 320],
    "aspp_out_channels": 128,
}
TRAIN: dict[str, Any] = {"batch": 8, "micro_batch": 8, "warmup": 30, "save_every": 10_000}
BEGUN, LATER = {"steps": 240, "lr": 2e-3}, {"steps": 60, "lr": 1e-3}
"""From random numbers, and of a pruned model."""


def base(scratch: Path, name: str, sizes: dict[str, Any], seed: int) -> Path:
    """The folder of a segmenter of random numbers, which says how it sees."""
    folder = scratch / f"base-{name}"
    if not folder.exists():
        labels = {"id2label": dict(enumerate(NAMES)), "label2id": {one: i for i, one in enumerate(NAMES)}}
        config = MobileViTConfig(**SEEN, **sizes, **labels, semantic_loss_ignore_index=NO_CLASS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = MobileViTForSemanticSegmentation(config)
        begin_norms_(made)
        made.save_pretrained(folder)
        fields = {"do_normalize": False, "do_flip_channel_order": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(fields), "utf-8")
    return folder


def learned(cell: Cell, updates: dict[str, Any], halves: int = 1) -> dict[str, Any]:
    """The stage that trains what a cell is about."""
    shared = {**TRAIN, **updates, "steps": updates["steps"] // halves, "lr_schedule": "linear"}
    if cell.taught:
        return {"distill": {"train": "all", "divergence": "mse", "hard_weight": 1.0, **shared}}
    return {"recover": {"train": "all", **shared}}


def recipe(cell: Cell) -> list[dict[str, Any]]:
    """The stages of a cell that a recipe may have; what gates leave, MobileViT's config has no fields for."""
    if cell.what == "dense":
        return [{"finetune": {**TRAIN, **BEGUN}}]
    if cell.what == "half":
        return [learned(cell, BEGUN)]
    if cell.what == "l2":
        return [{"filter_pruning": {"keep": 1 - cell.gone / 100}}, learned(cell, LATER)]
    return [learned(cell, LATER, halves=2 if cell.what == "gates" else 1)]


def gates(cell: Cell, share: float) -> Stage | None:
    """What removes channels by gates. share: of block parameters that stay."""
    seen = {key: TRAIN[key] for key in ("batch", "micro_batch")}
    kinds = (Kind.CHANNEL,)
    if cell.what == "taylor":
        return GateTaylor(keep=share, kinds=kinds, batches=16, **seen)
    if cell.what != "gates":
        return None
    return LearnGates(
        keep=share,
        kinds=kinds,
        tune=0,
        ramp=0,
        hold=LATER["steps"] // 2,
        constraint="projection",
        cost_aware=True,
        start="score",
        noise="example",
        finish="hard",
        targets=("query", "value"),
        save_every=TRAIN["save_every"],
        **seen,
    )


class Bench:
    """Where models are kept, where the data is, and the seed."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.seed = scratch, seed
        self.data = Path(os.environ["COMPRESSO_DATA"]) / VISION

    def ready(self, name: str, stages: list[dict[str, Any]]) -> Ready:
        """A recipe for a segmenter of random numbers."""
        folder = base(self.scratch, name, HALF if name == "half" else SMALL, self.seed)
        train = self.data / "camvid_train_160x120.parquet"
        return ready({"name": "cell", "stages": stages}, str(folder), train, TASK, (), self.scratch)

    def stored(self, name: str) -> PreTrainedModel:
        """A model of a finished cell, which this script wrote."""
        model: PreTrainedModel = torch.load(self.scratch / f"{name}.pt", weights_only=False)
        return model

    def rows(self, made: Ready) -> list[Row]:
        """The pictures of the test part as the model sees them."""
        source, task = open_source(base(self.scratch, "dense", SMALL, self.seed)), made.prepared.recipe.task
        records = load_records(self.data / "camvid_test_160x120.parquet", form=task.form)
        return list(task.encode(records, None, Reading(0, pixels=pixel_input(source)), source.config).rows)

    def cell(self, name: str, cell: Cell, share: float) -> dict[str, Any]:
        """One model of the table, stored."""
        begun = time.process_time()
        made = self.ready("half" if cell.what == "half" else "dense", recipe(cell))
        job = made.job(self.seed, None if cell.what in ("dense", "half") else self.stored("dense"))
        if cell.taught:
            job = taught_by(job, self.stored("dense"))
        first = gates(cell, share)
        for stage in (*([first] if first else []), *made.stages.values()):
            job = run(stage, job)
        model = job.model.eval()
        score: Any = job.task.score(model, self.rows(made))  # a segmentation's
        torch.save(model, self.scratch / f"{name}.pt")
        arch = arch_for(model.config)
        counted = CostModel(arch.axes(model), arch.weights(model))()
        kept = next(
            (facts["kept_share_of_blocks"] for facts in job.records.values() if "kept_share_of_blocks" in facts), 1
        )
        return {
            "miou": score.miou,
            "guess": score.guess,
            "pixels": sum(row[i] for i, row in enumerate(score.counted)) / sum(map(sum, score.counted)),
            "by_class": dict(zip(NAMES, score.by_class, strict=True)),
            "pictures": score.pictures,
            "parameters": int(counted.total),
            "macs": int(counted.macs),
            "kept_share_of_blocks": kept,
            "cpu_s": round(time.process_time() - begun, 1),
        }

    def file(self, name: str, dtype: str) -> dict[str, Any]:
        """A stored model as a graph: what ONNX Runtime scores with it, and what both engines make of it."""
        made, model = self.ready("dense", recipe(CELLS["dense"])), self.stored(name)
        task, rows = made.prepared.recipe.task, self.rows(made)[::4]
        train = made.job(self.seed).rows
        spread = [train[i * len(train) // CALIBRATED] for i in range(CALIBRATED)]
        shown = task.collate(rows, 0)
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            folder = Path(scratch) / "graph"
            pictures = task.collate(spread, 0)["pixel_values"] if dtype == "int8" else None
            save_onnx_encoder(model, folder, dtype=dtype, pictures=pictures)
            reference = encoder_reference(model, None, dtype, shown["pixel_values"])
            found = {one.program: looked_at(one, folder, reference, agreed=True) for one in RUNTIMES}
            able = [one for one in RUNTIMES if found[one.program]["opens"] == "yes"]
            scores = {one.program: self._miou(one, folder, shown) for one in able}
            size = (folder / GRAPH).stat().st_size
        for program, score in scores.items():
            found[program]["miou"] = score
        with torch.no_grad():
            model_miou = _miou_of(model(pixel_values=shown["pixel_values"]).logits, shown["labels"])
        return {
            "pictures": len(rows),
            "model_miou": model_miou,
            "bytes": size,
            "calibrated_on": 0 if pictures is None else CALIBRATED,
            "engines": found,
        }

    def _miou(self, engine: OnnxEngine, folder: Path, shown: dict[str, torch.Tensor]) -> float:
        return _miou_of(encoder_logits(engine, folder, {"pixel_values": shown["pixel_values"]}), shown["labels"])


def _miou_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    each = intersection_over_union(confusion(at_labels(logits, labels).argmax(1), labels, len(NAMES)))
    return float(each[~each.isnan()].mean())


def main() -> None:
    """Do what is missing, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--only", default="*", help="cells to do")
    parser.add_argument("--seed", type=int, default=0)
    given = asked(parser)
    keys, seed = ("seed", "cell", "file"), given.seed
    if not given.report:
        bench = Bench(given.scratch, seed)
        wanted = [name for name in CELLS if fnmatch(name, given.only)]
        for _, name, _ in missing(LINES, keys, ((seed, name, None) for name in wanted)):
            done = {line["cell"]: line for line in stored(LINES) if line["seed"] == seed and "file" not in line}
            share = done.get("l2 50 taught", {}).get("kept_share_of_blocks", 1.0)
            found = bench.cell(name, CELLS[name], share)
            how = {"size": SEEN["image_size"], "batch": TRAIN["batch"], "begun": BEGUN, "later": LATER}
            keep(LINES, {"seed": seed, "cell": name, "how": how, **found, **here()}, hidden=("by_class",))
        made = {line["cell"] for line in stored(LINES) if line["seed"] == seed and "file" not in line}
        files = [(seed, name, dtype) for name, dtype in FILES if name in made and fnmatch(name, given.only)]
        for _, name, dtype in missing(LINES, keys, files):
            facts = {"seed": seed, "cell": name, "file": dtype, **bench.file(name, dtype)}
            keep(LINES, {**facts, "machine": here()["machine"]})
    report()


if __name__ == "__main__":
    main()
