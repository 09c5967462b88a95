"""Expert drop, layer drop, block drop and expert slimming at equal bytes, each as it is and rounded to 4 bits, on a
small mixture whose routing comes from training (`scripts/train_moe.py`).

    python benchmarks/moe.py --model moe-nano [--items 5] [--documents 40] [--seed 0] [--recovery 0] [--threads 1]
        [--report]

A finished cell is a line of results/moe.jsonl and is not repeated. A method works once; roundings start from copies of
what it left: to the nearest, and by GPTQ at three of them (it would fill a pattern of zeros). Calibration is 64 rows of
128 tokens, documents and instructions of the embedded world alike; scored are fresh documents (loss) and held-out
items of every task (accuracy). `--report` writes results/moe.md.

With `--recovery 200` all weights train for so many updates of 8 rows, other text than is scored, behind what left and
before what is rounded, dense likewise; zeros of slimming are kept (`sparse_finetune`, by the labels alone). Lines of
these and a report of all seeds are moe_recovered.*. One training serves all roundings of a command; cpu_seconds of each
has it in, so that they are not to be added up. Seeds are those of the text; give each a mixture of its own seed, and
rows of one method are put together. A mixture is trained anew where it is not at hand, and other processors round
otherwise: rows name it by its file's hash, and are compared with the dense model of the same mixture. Tokens a second
are those of greedy decoding with a cache in transformers, in float32, of the CPU's seconds; memory is that of the
weights there, which codes do not make smaller.

Bytes are counted, not those of a file: 16 bits a weight as it stands, of n:m kept weights and two bits for the place of
each, of rounded ones the code and its share of scale and offset.
"""

import argparse
import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import RESULTS, machine
from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.core.sparsity import parse_pattern
from compresso.data import world
from compresso.data.prompt import body
from compresso.edit.stock import as_stock
from compresso.job import Job
from compresso.metrics.choices import choice_accuracy
from compresso.stage import card

LINES = RESULTS / "moe.jsonl"
FRESH = 31_415_926
LENGTH = 128
LOOKS: dict[str, Any] = {"batches": 4, "batch": 16, "micro_batch": 16}
EXPERTS = {"modules": ["*.experts.*"]}
CALIBRATION = {"examples": 64, "batch": 16}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", {}),
    "expert drop, 6 of 8": ("drop_experts", {"keep": 6 / 8, **LOOKS}),
    "layer drop, 1 of 6 mixtures": ("drop_layers", {"kinds": ["mlp"], "drop": 1, **LOOKS}),
    "block drop, 1 of 6": ("drop_layers", {"drop": 1, **LOOKS}),
    "slimming, 3:4": ("wanda", {"pattern": "3:4", "where": EXPERTS, "calibration": CALIBRATION}),
    "expert drop, 5 of 8": ("drop_experts", {"keep": 5 / 8, **LOOKS}),
    "expert drop (REAP), 5 of 8": ("drop_experts", {"keep": 5 / 8, "score": "reap", **LOOKS}),
    "layer drop, 2 of 6 mixtures": ("drop_layers", {"kinds": ["mlp"], "drop": 2, **LOOKS}),
    "block drop, 2 of 6": ("drop_layers", {"drop": 2, **LOOKS}),
    "slimming, 2:4": ("wanda", {"pattern": "2:4", "where": EXPERTS, "calibration": CALIBRATION}),
}
ROUNDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "16 bits": ("", {}),
    "4 bits, rtn": ("rtn", {"bits": 4, "group": 64, "clip": True}),
    "4 bits, gptq": ("gptq", {"bits": 4, "group": 64, "clip": True, "calibration": CALIBRATION}),
}
BY_GPTQ = ("dense", "block drop, 2 of 6", "expert drop, 5 of 8")
KEYS = ("method", "rounding", "items", "documents", "seed", "recovery", "mixture")
RECOVERED = RESULTS / "moe_recovered.jsonl"
RECOVERS: dict[str, Any] = {"train": "all", "batch": 8, "micro_batch": 8, "lr": 5e-4, "warmup": 10}
KEEPS_ZEROS: dict[str, Any] = {
    **{knob: value for knob, value in RECOVERS.items() if knob != "train"},
    "feature_weight": 0.0,
    "lr_schedule": "cosine",
}
"""The same training, by labels alone, for what has zeros."""


def begun(folder: Path, out: Path, seed: int) -> Job:
    """A job on the mixture, with its calibration."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = as_stock(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    rows = begun_rows(tokenizer, seed + 1, 68)
    plan, arch = Plan(), arch_for(model.config)
    held, rows = rows[:4], rows[4:]
    return Job(model, arch, tokenizer, rows, held, plan, {}, {}, seed=seed, out=out, quiet=True)


def begun_rows(tokenizer: Any, seed: int, count: int) -> list[dict[str, Any]]:
    """Rows of documents and instructions by turns; as many as there are, if the world's texts are too few."""
    texts = max(500, 4 * count)
    asked = (body(r["instruction"], r["input"]) + r["output"] for r in world.instructions(texts, seed))
    both = (text for pair in zip(world.documents(texts, seed), asked, strict=False) for text in pair)
    stream: list[int] = []
    for text in both:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= count * LENGTH:
            break
    cut = [stream[i : i + LENGTH] for i in range(0, min(count * LENGTH, len(stream) - LENGTH + 1), LENGTH)]
    return [{"input_ids": ids, "labels": ids} for ids in cut]


def applied(job: Job, stage: str, knobs: Mapping[str, Any]) -> Job:
    """What a stage leaves."""
    return card(stage).type(**knobs)(job) if stage else job


def size(job: Job, pattern: str | None) -> int:
    """Bytes, by the rule in this file's header. pattern: of the zeros, which have to be there still."""
    kept, index, bits = dict[str, float](), 0, dict[str, float]()
    for stage, told in job.records.items():
        if stage in ("wanda", "magnitude"):
            n, m = parse_pattern(pattern or "")
            kept |= dict.fromkeys(told["zeros"], n / m)
            index = math.ceil(math.log2(m))
            for name in told["zeros"]:
                assert int((job.model.get_parameter(name).unflatten(-1, (-1, m)) != 0).sum(-1).max()) <= n, name
        elif stage in ("rtn", "gptq"):
            bits |= dict.fromkeys(told["zeros"], told["bits"])
    return round(
        sum(
            parameter.numel() * kept.get(name, 1) * (bits.get(name, 16) + (index if name in kept else 0))
            for name, parameter in job.model.named_parameters()
        )
        / 8
    )


def recovered(job: Job, updates: int, seed: int) -> Job:
    """The job with all weights trained on rows of their own."""
    more = replace(job, rows=begun_rows(job.tokenizer, seed + 2, 8 * updates), out=job.out / "recovered")
    if any(told.get("sparsity") for told in job.records.values()):  # zeros stay
        return replace(applied(more, "sparse_finetune", {**KEEPS_ZEROS, "steps": updates}), rows=job.rows)
    return replace(applied(more, "recover", {**RECOVERS, "steps": updates}), rows=job.rows)


def decoded(job: Job, tokens: int = 48) -> float:
    """Tokens a CPU second of greedy decoding, the best of three."""
    ids, best = torch.arange(3, 35).unsqueeze(0), math.inf
    for _ in range(3):
        busy = time.process_time()
        with torch.no_grad():
            job.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        best = min(best, time.process_time() - busy)
    return tokens / best


def scored(job: Job, items: int, n_documents: int) -> dict[str, Any]:
    """Loss of each of some fresh documents, and accuracy on held-out items of every task."""
    losses: list[float] = []
    for text in world.documents(n_documents, FRESH):
        ids = torch.tensor([job.tokenizer(text)["input_ids"][:LENGTH]])
        with torch.no_grad():
            logits = job.model(input_ids=ids).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    asked = [item for task in world.TASKS for item in world.items(task, items, FRESH)]
    found = choice_accuracy(job.model, job.tokenizer, asked)
    return {"losses": losses, "accuracy": found.accuracy, "stderr": found.stderr, "tasks": found.tasks}


def rows() -> list[dict[str, Any]]:
    """Finished cells."""
    files = [file for file in (LINES, RECOVERED) if file.exists()]
    known = {"recovery": 0, "mixture": ""}  # of rows that are older than these
    return [{**known, **json.loads(line)} for file in files for line in file.read_text("utf-8").splitlines()]


def recovery_report(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A part of results/moe_recovered.md: means over seeds, with their range."""
    first, where = cells[0], cells[0]["machine"]
    yield f"## {first['recovery'] or 'No'} updates of recovery"
    yield ""
    yield (
        f"`benchmarks/moe.py --recovery {first['recovery']}`, {where['processor']}, {where['threads']} thread of"
        f" {where['cores']} cores. Mixtures of {first['model']['updates']} updates; loss on fresh documents, paired"
        " with dense of the same mixture and the same recovery"
        + ("; all weights trained, before any rounding, and zeros kept." if first["recovery"] else ".")
    )
    yield ""
    yield "| method | rounding | mixtures | bytes | loss | against dense | accuracy | tokens a CPU s | in memory |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for method, rounding in dict.fromkeys((c["method"], c["rounding"]) for c in cells):
        mine = [c for c in cells if (c["method"], c["rounding"]) == (method, rounding)]
        whole = {
            (c["seed"], c["mixture"]): sum(c["losses"]) / len(c["losses"])
            for c in cells
            if c["method"] == "dense" and c["rounding"] == "16 bits"
        }
        mean = [sum(c["losses"]) / len(c["losses"]) for c in mine]
        apart = [
            one - whole[c["seed"], c["mixture"]]
            for one, c in zip(mean, mine, strict=True)
            if (c["seed"], c["mixture"]) in whole
        ]
        told = (
            f"{sum(apart) / len(apart):+.3f} ({min(apart):+.3f} to {max(apart):+.3f})" if apart else "dense is missing"
        )
        yield (
            f"| {method} | {rounding} | {len(mine)} | {mine[0]['bytes']:,} | {sum(mean) / len(mean):.3f} | {told} |"
            f" {sum(c['accuracy'] for c in mine) / len(mine):.3f} |"
            f" {sum(c['tokens_a_cpu_second'] for c in mine) / len(mine):.0f} | {mine[0]['memory'] / 1e6:.1f} MB |"
        )


def report(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of results/moe.md."""
    first, where = cells[0], cells[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    whole = next(c for c in cells if c["method"] == "dense" and c["rounding"] == "16 bits")
    yield "# Mixtures: experts, layers, blocks or weights leave, and the rest is rounded"
    yield ""
    yield (
        f"`benchmarks/moe.py`, {where['processor']}, {where['threads']} thread of {where['cores']} cores; {versions}."
        f" A mixture of {first['model']['parameters']:,} parameters with 8 experts, 2 a token, in 6 layers"
        f" (`scripts/train_moe.py`, {first['model']['updates']} updates). One seed, no recovery: differences of one"
        " model. Loss on fresh documents in nats a token, against dense paired by document, ± one standard error;"
        f" accuracy on {first['items']} held-out items of each of {len(world.TASKS)} tasks. Bytes"
        " by the rule in the script."
    )
    for rounding in (one for one in ROUNDINGS if any(c["rounding"] == one for c in cells)):
        yield ""
        yield f"## {rounding}"
        yield ""
        yield "| method | bytes | of dense | loss | against dense | accuracy | active of dense | CPU s |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for c in (c for c in cells if c["rounding"] == rounding):
            apart = torch.tensor(c["losses"], dtype=torch.float64) - torch.tensor(whole["losses"], dtype=torch.float64)
            yield (
                f"| {c['method']} | {c['bytes']:,} | {c['bytes'] / whole['bytes']:.1%} |"
                f" {sum(c['losses']) / len(c['losses']):.3f} |"
                f" {float(apart.mean()):+.3f} ± {float(apart.std() / math.sqrt(len(apart))):.3f} |"
                f" {c['accuracy']:.3f} ± {c['stderr']:.3f} | {c['active'] / whole['active']:.1%} |"
                f" {c['cpu_seconds']:.0f} |"
            )


def main() -> None:
    """Measure what is missing, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=list(ROUNDINGS))
    parser.add_argument("--items", type=int, default=5)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recovery", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.report:
        plain, more = [c for c in rows() if not c["recovery"]], [c for c in rows() if c["recovery"]]
        one_seed = [c for c in plain if c["seed"] == plain[0]["seed"]]
        (RESULTS / "moe.md").write_text("\n".join(report(one_seed)) + "\n", "utf-8")
        parts = ["\n".join(recovery_report(cells)) for cells in (more, plain) if cells]
        text = "\n\n".join(["# Mixtures of several seeds, recovered and not", *parts])
        (RESULTS / "moe_recovered.md").write_text(text + "\n", "utf-8")
        return
    mixture = hashlib.sha256((given.model / "model.safetensors").read_bytes()).hexdigest()[:8]
    made = json.loads((given.model / "records.json").read_text("utf-8"))["stages"]["finetune"]
    for method in given.methods:
        keys = {"method": method, "items": given.items, "documents": given.documents, "seed": given.seed}
        keys |= {"recovery": given.recovery, "mixture": mixture}
        missing = [
            rounding
            for rounding in given.roundings
            if (rounding != "4 bits, gptq" or method in BY_GPTQ)
            and not any(all(row[key] == {**keys, "rounding": rounding}[key] for key in KEYS) for row in rows())
        ]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            busy = time.process_time()
            left = applied(begun(given.model, Path(scratch), given.seed), *METHODS[method])
            if given.recovery:
                left = recovered(left, given.recovery, given.seed)
            spent = time.process_time() - busy
            for rounding in missing:
                busy = time.process_time()
                copied = replace(left, model=copy.deepcopy(left.model), out=Path(scratch) / rounding)
                job = applied(copied, *ROUNDINGS[rounding])
                seconds = spent + time.process_time() - busy
                row = {
                    **keys,
                    "rounding": rounding,
                    "bytes": size(job, METHODS[method][1].get("pattern")),
                    "active": int(job.cost()().active),
                    "cpu_seconds": round(seconds, 1),
                    **scored(job, given.items, given.documents),
                    "tokens_a_cpu_second": round(decoded(job), 1),
                    "memory": sum(p.numel() * p.element_size() for p in job.model.parameters()),
                    "model": {"parameters": made["trainable"], "updates": made["updates"]},
                    "machine": machine(),
                }
                with (RECOVERED if given.recovery else LINES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    method, rounding, row["bytes"], sum(row["losses"]) / len(row["losses"]), row["accuracy"], flush=True
                )


if __name__ == "__main__":
    main()
