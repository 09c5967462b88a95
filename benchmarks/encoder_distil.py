"""HomoDistil on a real encoder, beside pruning once and beside a smaller start, after as many updates.

    python benchmarks/encoder_distil.py ENCODER --scratch FOLDER [--seeds 0 1 2] [--only GLOB]
    python benchmarks/encoder_distil.py --report

The encoder gets a head for masked tokens and is tuned for them once (`finetune`): that model is the teacher. Students
keep half of all parameters, as many heads, channels and hidden dimensions each, and learn by the same loss, rate,
batches and number of updates:

    homodistil    whole heads leave, on the recipe's schedule: from the first update to 70 % of them
    sooner        the same, to 35 %: behind that a rate that falls linearly has nearly half of its area, not a tenth
    once          all units leave after update 8, by the same sensitivities, averaged over these 8
    first         begins with the first units of the teacher, whatever they do

    narrow, narrow-sooner, narrow-once   as the first three, and every head loses half of its channels, as published

Then each is fine-tuned on SST-2 and MRPC in the same way, and scored on their test files, which choose nothing.
Training computes in bfloat16 (autocast), scores in float32. A finished cell is a line of results/encoder_distil.jsonl.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.edit.stock import as_stock
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.homodistil import HomoDistil
from encoder_distil_report import LAST, LINES, METHODS, report
from encoders import BENCH, Ready, packed, ready, run
from kept import asked, here, keep, missing, options, stored

TEXT = "datasets/text/wikitext2_raw_train_part.jsonl.gz"
LENGTH, BATCH, KEEP, UPDATES, OBSERVED = 64, 8, 0.5, 80, 8
SHARED: dict[str, Any] = {"precision": "bf16", "save_every": 10_000}
TEACHER = {"steps": 200, "batch": BATCH, "micro_batch": BATCH, "lr": 5e-4, "warmup": 20, **SHARED}
STUDENT: dict[str, Any] = {
    "keep": KEEP,
    "cuts": 8,
    "steps": UPDATES,
    "batch": BATCH,
    "micro_batch": BATCH,
    "lr": 5e-4,
    **SHARED,
}
WHOLE = {"kinds": "[head, channel, hidden]"}
SOONER, ONCE = {"done": 0.35}, {"start": (OBSERVED - 1) / UPDATES, "done": OBSERVED / UPDATES}
KNOBS: dict[str, dict[str, Any]] = {
    "homodistil": WHOLE,
    "sooner": {**SOONER, **WHOLE},
    "once": {**ONCE, **WHOLE},
    "first": {"done": 1e-6, **WHOLE},
    "narrow": {},
    "narrow-sooner": SOONER,
    "narrow-once": ONCE,
}
TUNED: dict[str, dict[str, Any]] = {
    "sst2": {"steps": 80, "lr": 2e-4, **SHARED},
    "mrpc": {"steps": 60, "lr": 2e-4, **SHARED},
}
"""Of each task the fine-tuning."""
CUT, SCORED = {"sst2": 40, "mrpc": 80}, 128
"""Tokens that are read of a training row, and of a scored one."""
SAME = 1e-3
"""Nats by which a teacher that was made again may differ from one whose students are stored, and be the same."""
PARTS = ("loss", "hard", "divergence", "embedding", "hidden", "attention")


@dataclass(frozen=True)
class Given:
    """The encoder, where models are kept, and where the data is."""

    encoder: str
    scratch: Path
    root: Path


def teacher(given: Given) -> Path:
    """The folder of the encoder tuned for masked tokens, made if it is not there."""
    folder = given.scratch / "teacher"
    if not folder.exists():
        raw = {"name": "tuning", "data": {"max_length": LENGTH}, "stages": [{"finetune": TEACHER}]}
        made = ready(raw, given.encoder, given.root / TEXT, "masked-lm", (), given.scratch)
        begun, job = time.process_time(), run(made.stages["finetune"], made.job(0))
        save_checkpoint(job.model, arch_for(job.model.config).shapes(job.model), folder, tokenizer=job.tokenizer)
        score = job.task.score(job.model, job.held)
        curve = job.records["finetune"]["curve"]["loss"]
        how = {"length": LENGTH, **{name: TEACHER[name] for name in ("steps", "batch", "lr")}}
        facts = {
            "how": how,
            "parameters": job.cost()().parameters(),
            "held_nats": score.mean,
            "held_accuracy": score.accuracy,  # pyright: ignore[reportAttributeAccessIssue]  # of masked tokens
            "first_loss": curve[0],
            "last_loss": statistics.fmean(curve[-LAST:]),
            "cpu_s": round(time.process_time() - begun, 1),
        }
        known = [line["held_nats"] for line in stored(LINES) if line["method"] == "teacher"]
        if all(abs(nats - facts["held_nats"]) > SAME for nats in known):  # another processor rounds otherwise
            _add({"part": "texts", "method": "teacher", "seed": len(known), **facts})
        (given.scratch / "teacher.json").write_text(json.dumps(facts["held_nats"]), "utf-8")
    return folder


def teachers_nats(given: Given) -> float:
    """What the teacher made here has on held-out texts, by which it is told from others."""
    return json.loads((teacher(given).parent / "teacher.json").read_text("utf-8"))


def distilled(made: Ready, method: str, seed: int) -> Job:
    """A student."""
    job, stage = made.job(seed), made.stages["homodistil"]
    assert isinstance(stage, HomoDistil)
    if method == "first":
        axes, wanted = job.arch.axes(job.model), stage.final(job.arch.axes(job.model), job.cost())
        shares = {
            axis.name: torch.full((axis.size,), wanted[axis.name] / axis.size) for axis in axes if axis.name in wanted
        }
        target = float(job.cost()(shares).count("total"))
        # one more channel a layer, which leaves at once: a stage that keeps everything trains nothing
        more = {name: n + name.endswith("channels") for name, n in wanted.items()}
        masks = {axis.name: (torch.arange(axis.size) < more[axis.name]).float() for axis in axes if axis.name in more}
        job = job.without(masks, "first")
        keep = (target + 1) / job.cost()().parameters()["total"]
        stage = replace(stage, removes=replace(stage.removes, keep=keep, kinds=("channel",)))
    return run(stage, job)


def student(given: Given, method: str, seed: int) -> dict[str, Any]:
    """What a student lost on the way and at the end; it is kept."""
    begun = time.process_time()
    made = _texts(given, method)
    job = distilled(made, method, seed)
    record = job.records["homodistil"]
    curve = record["curve"]
    first = max(curve["update"]) - LAST
    last = {
        name: statistics.fmean(value for at, value in zip(curve["update"], curve[name], strict=True) if at > first)
        for name in PARTS
    }
    facts = {
        "how": {"length": LENGTH, "observed": OBSERVED, **{name: STUDENT[name] for name in ("keep", "batch", "lr")}},
        "updates": record["updates"],
        "parameters": job.cost()().parameters(),
        "config": {
            name: getattr(job.model.config, name)
            for name in ("hidden_size", "num_attention_heads", "intermediate_size")
        },
        "peak_divergence": max(curve["divergence"]),
        "divergence": [round(one, 4) for one in curve["divergence"]],
        "last": last,
        "held": apart(job, made.job(0).model),
    }
    folder = given.scratch / f"{method}-{seed}"
    save_checkpoint(job.model, job.arch.shapes(job.model), folder, tokenizer=job.tokenizer, force=True)
    return {**facts, "cpu_s": round(time.process_time() - begun, 1)}


@torch.inference_mode()
def apart(job: Job, dense: PreTrainedModel) -> dict[str, float]:
    """On held-out texts, of masked tokens: nats of a student, and KL(teacher || student)."""
    ours, theirs = (job.task.halves(model.eval(), ()) for model in (job.model, dense))
    nats = divergence = tokens = 0.0
    for start in range(0, len(job.held), 32):
        batch = job.collated(job.held[start : start + 32])
        at = job.task.compare(batch, "labelled")
        q, p = (half.logits(half.read(batch)[0][at.places]).float().log_softmax(-1) for half in (ours, theirs))
        nats += float(functional.nll_loss(q, at.targets[at.places], reduction="sum"))
        divergence += float((p.exp() * (p - q)).sum())
        tokens += len(q)
    return {"nats": nats / tokens, "divergence": divergence / tokens, "tokens": tokens}


def tuned(given: Given, method: str, seed: int, task: str) -> dict[str, Any]:
    """A student fine-tuned on a task, and scored."""
    begun, made = time.process_time(), _labelled(given, task)
    source = open_source(given.scratch / f"{method}-{seed}")
    model = as_stock(load_model(source, dtype=torch.float32, device=torch.device("cpu")))
    job = run(made.stages["finetune"], made.job(seed, model))
    rows = made.rows(given.root / BENCH / f"{task}_test.jsonl.gz", job.model.config, SCORED)
    score: Any = job.task.score(job.model.eval(), rows)  # a classification's
    right = score.right
    facts = {"accuracy": sum(right) / len(right), "f1": score.f1[0], "guess": score.guess, "n": len(right)}
    knobs = {"max_length": CUT[task], **{name: TUNED[task][name] for name in ("steps", "lr")}}
    return {**facts, "right": packed(right), "knobs": knobs, "cpu_s": round(time.process_time() - begun, 1)}


@cache
def _texts(given: Given, method: str) -> Ready:
    knobs = {**STUDENT, **KNOBS[method]}
    sets = [f"data.max_length={LENGTH}", *(f"stages.homodistil.{name}={value}" for name, value in knobs.items())]
    return ready("homodistil", str(teacher(given)), given.root / TEXT, "masked-lm", sets, given.scratch)


@cache
def _labelled(given: Given, task: str) -> Ready:
    raw = {"name": "fine-tuning", "data": {"max_length": CUT[task]}, "stages": [{"finetune": TUNED[task]}]}
    return ready(raw, given.encoder, given.root / BENCH / f"{task}_train.jsonl.gz", "classification", (), given.scratch)


def _add(line: dict[str, Any]) -> None:
    keep(LINES, {**line, **here()}, hidden=("divergence", "right"))


def main() -> None:
    """Do what is missing, and write the table."""
    parser = options(__doc__)
    parser.add_argument("encoder", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="*", help="cells whose PART-METHOD-SEED fits, such as 'texts-once-*'")
    told = asked(parser)
    if not told.report:
        given = Given(told.encoder, told.scratch, Path(os.environ["COMPRESSO_DATA"]))
        cells = [(part, method, seed) for seed, part, method in product(told.seeds, ("texts", *TUNED), METHODS)]
        for part, method, seed in missing(LINES, ("part", "method", "seed"), cells, told.only):
            facts = student(given, method, seed) if part == "texts" else tuned(given, method, seed, part)
            _add({"part": part, "method": method, "seed": seed, "teacher": teachers_nats(given), **facts})
    report()


if __name__ == "__main__":
    main()
