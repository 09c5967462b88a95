"""Weights and activations of 4 bits on a real encoder, before and after training under its full model; and a decoder.

    python benchmarks/encoder_qat.py ENCODER --decoder DECODER --scratch FOLDER [--seeds 0 1 2] [--only GLOB]
    python benchmarks/encoder_qat.py --report

A seed of a task: the encoder is fine-tuned (`finetune`), which gives FP32 and the teacher; the recipes qat/w4a4 and
qat/w8a8 then start from it, with `steps: 0` (rounded, not trained) or shortened. The last state of a training is
scored, and its start, since an encoder that is fine-tuned anew on another processor is not the same to the bit; the
test file is scored once for each and chooses nothing. Training computes in bfloat16 (autocast), scores in
float32. A finished cell is a line of results/encoder_qat.jsonl.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.formats.hf import save_checkpoint
from compresso.metrics.corpora import corpus
from compresso.metrics.perplexity import perplexity
from compresso.metrics.protocol import PerplexityProtocol
from encoder_qat_report import LINES, TASKS, WINDOW, WINDOWS, report
from encoders import BENCH, Ready, packed, ready, run
from kept import asked, here, keep, missing, options

LENGTH = 128
TUNED: dict[str, dict[str, Any]] = {
    "sst2": {"steps": "1 epoch", "lr": 1e-4},
    "mrpc": {"steps": "3 epochs", "lr": 1e-4},
}
"""Of each task the fine-tuning."""
TRAINED: dict[str, dict[str, Any]] = {
    "sst2": {"steps": 104, "lr": 1e-4, "warmup": 10},
    "mrpc": {"steps": 58, "lr": 1e-4, "warmup": 10},
}
"""Of each task what is other than in qat/w4a4. The student learns without dropout: its noise is more than what rounding
takes, and the teacher's states are exact.
"""
ROUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8 rounded": ("qat/w8a8", {"steps": 0}),
    "w4a16 rounded": ("qat/w4a4", {"steps": 0, "input_bits": 16}),
    "w4a4 rounded": ("qat/w4a4", {"steps": 0}),
    "w4a4 trained": ("qat/w4a4", {}),
    "w4a4 longer": ("qat/w4a4", {"steps": 832, "warmup": 50}),
    "w4a4 dropout": ("qat/w4a4", {}),
    "w4a4 dropout, faster": ("qat/w4a4", {"lr": 3e-4}),
}
"""Cell -> recipe and knobs. Those with dropout were tried on the first seed."""
DECODED = {"dense": {}, "w4a16": {"input_bits": 16}, "w4a4": {}}


def sets_of(stage: str, knobs: dict[str, Any]) -> list[str]:
    """Overrides of a stage's knobs."""
    return [f"stages.{stage}.{name}={value}" for name, value in knobs.items()]


def fine_tuned(given: argparse.Namespace, root: Path, task: str, seed: int) -> Path:
    """The folder of the dense model of a task and seed, made if it is not there."""
    folder = given.scratch / f"{task}-{seed}"
    if not folder.exists():
        knobs = {"save_every": 10_000, "precision": "bf16", **TUNED[task]}
        raw = {"name": "fine-tuning", "data": {"max_length": LENGTH}, "stages": [{"finetune": knobs}]}
        made = _ready(raw, given.encoder, root, task, (), given.scratch)
        job = run(made.stages["finetune"], made.job(seed))
        save_checkpoint(job.model, arch_for(job.model.config).shapes(job.model), folder, tokenizer=job.tokenizer)
    return folder


def scored(made: Ready, model: PreTrainedModel, root: Path, task: str) -> dict[str, Any]:
    """Accuracy and F1 on the test file, and which examples were right."""
    begun = time.process_time()
    score = made.prepared.recipe.task.score(
        model.eval(), made.rows(root / BENCH / f"{task}_test.jsonl.gz", model.config, LENGTH)
    )
    f1, right = score.f1[0], score.right  # pyright: ignore[reportAttributeAccessIssue]  # a classification's
    seconds = round(time.process_time() - begun, 1)
    return {
        "accuracy": sum(right) / len(right),
        "f1": f1,
        "n": len(right),
        "right": packed(right),
        "scoring_s": seconds,
    }


def _ready(
    recipe: str | dict[str, Any], model: str, root: Path, task: str, sets: Sequence[str], scratch: Path
) -> Ready:
    return ready(recipe, model, root / BENCH / f"{task}_train.jsonl.gz", "classification", sets, scratch)


def cell(given: argparse.Namespace, root: Path, task: str, seed: int, name: str) -> dict[str, Any]:
    """One number of the encoder's table."""
    begun = time.process_time()
    dense = fine_tuned(given, root, task, seed)
    if name == "fp32":
        made = _ready("qat/w4a4", str(dense), root, task, (), given.scratch)
        facts = scored(made, made.job(seed).model, root, task)
        return {**facts, "knobs": TUNED[task], "cpu_s": round(time.process_time() - begun, 1)}
    recipe, knobs = ROUNDED[name]
    trained = knobs.get("steps") != 0
    if trained:
        knobs = {"precision": "bf16", "save_every": 10_000, "evaluations": 0, **TRAINED[task], **knobs}
    made = _ready(recipe, str(dense), root, task, sets_of("qat", knobs), given.scratch)
    job = made.job(seed)
    start = scored(made, job.model, root, task)
    if trained and "dropout" not in name:
        without_dropout_(job.model)
    job = run(made.stages["qat"], job)
    record, curve = job.records["qat"], job.records["qat"].get("curve", {})
    facts: dict[str, Any] = {"updates": record["updates"]}
    facts |= {f"first_and_last_{name}": [curve[name][0], curve[name][-1]] for name in sorted(curve) if name != "update"}
    return {
        **scored(made, job.model, root, task),
        **facts,
        "start": {name: start[name] for name in ("accuracy", "n", "right")},
        "knobs": knobs,
        "cpu_s": round(time.process_time() - begun, 1),
    }


def without_dropout_(model: PreTrainedModel) -> None:
    """As if the config had no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def decoded(given: argparse.Namespace, root: Path, name: str) -> dict[str, Any]:
    """Perplexity of the decoder, dense or rounded and not trained."""
    data = root / "datasets/text/wikitext2_raw_train_part.jsonl.gz"
    sets = [*sets_of("qat", {"steps": 0, **DECODED[name]}), "data.limit=100"]
    made = ready("qat/w4a4", given.decoder, data, "causal-lm", sets, given.scratch)
    job = made.job(0)
    if name != "dense":
        job = run(made.stages["qat"], job)
    texts = corpus("wikitext2", data_root=root)
    how = PerplexityProtocol("wikitext2", texts.split, "blank line", WINDOW, bos="none", max_windows=WINDOWS)
    assert job.tokenizer is not None
    found = perplexity(job.model.eval(), job.tokenizer, texts.texts, how, batch_size=2)
    return {"perplexity": found.value, "loss": found.loss, "stderr": found.stderr, "tokens": found.n_tokens}


def main() -> None:
    """Do what is missing, and write the table."""
    parser = options(__doc__)
    parser.add_argument("encoder", nargs="?")
    parser.add_argument("--decoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="*", help="cells whose TASK-SEED-NAME fits, such as 'sst2-*'")
    given = asked(parser)
    root = Path(os.environ["COMPRESSO_DATA"])
    if not given.report:
        first = ("fp32", "w4a4 rounded", "w4a4 trained")
        order = (*first, *(name for name in ROUNDED if name not in first))
        cells = [(task, seed, name) for task in TASKS for seed in given.seeds for name in order]
        cells += [("decoder", 0, name) for name in DECODED] if given.decoder else []
        for task, seed, name in missing(LINES, ("task", "seed", "cell"), cells, given.only):
            found = decoded(given, root, name) if task == "decoder" else cell(given, root, task, seed, name)
            keep(LINES, {"task": task, "seed": seed, "cell": name, **found, **here()}, hidden=("right",))
    report()


if __name__ == "__main__":
    main()
