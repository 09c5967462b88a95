"""Live share of the context against perplexity: learned gates beside caches that forget by a rule, at equal shares.

    python benchmarks/context.py train --model MODEL --data TEXTS --updates 200 --folder FOLDER
    python benchmarks/context.py score --model MODEL --gates FOLDER --text TEXTS --results results/context.jsonl
    python benchmarks/context.py table --results results/context.jsonl

Gates are trained once, on a frozen body, and all their offsets are shifted to each share on training texts. Rules read
a window in chunks, and the cache is cut after each; so their queries see up to a chunk more than the share, and "seen"
is what queries could attend to of what came before them, counted alike for all. A line of the results is one method at
one share; those that are there are not taken again.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import compresso
from common import machine
from compresso.core.context_gates import landed
from compresso.edit.context_attention import release_
from compresso.edit.context_cache import ContextCache
from compresso.edit.context_gates import ContextGates, gates_of, live_by_layer
from compresso.edit.evict import evict_, parse
from compresso.edit.patches import read_patches
from compresso.loading import Loaded

SHARES = (0.75, 0.5, 0.25)
RULES = ("window", "keydiff", "knorm", "h2o")
LANDING = 6


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines {"text"}."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield str(json.loads(line)["text"])


def windows(loaded: Loaded, path: Path, length: int, n: int) -> Tensor:
    """The first n windows of all texts in a row [n, length]."""
    assert loaded.tokenizer is not None
    ids: list[int] = []
    for text in texts_of(path):
        ids += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length * n:
            break
    return torch.tensor(ids[: length * n]).view(n, length)


def train(options: argparse.Namespace) -> None:
    """Train gates alone, through a run."""
    stage = {
        "keep_context": 0.5,
        "train": "gates",
        "alpha_start": 2.0,
        "offset": 1.75,
        "spread": 0.5,
        "gamma": 0.15,
        "dual_rate": 5e-3,
        "steps": options.updates,
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "lr": options.lr,
        "lr_schedule": "cosine",
        "warmup": 10,
        "clip": 1.0,
        "save_every": 10,
    }
    data = {"max_length": options.length, "prompt": False, "pack": True, "held": 8}
    raw = {"name": "context-benchmark", "data": data, "stages": [{"context_gates": stage}]}
    folder = Path(options.folder)
    resume = folder.with_name(folder.name + ".partial").exists()
    compresso.run(raw, options.model, options.data, output=folder, measure="none", allow_collapsed=True, resume=resume)


@torch.no_grad()
def scored(model: PreTrainedModel, rows: Tensor, chunk: int | None) -> tuple[float, float | None]:
    """Perplexity of windows, one at a time, and what queries could see of the tokens before them; None where the model
    has no cache of ours.

    chunk: tokens read at a time through a cache; None for all, without one.
    """
    nats, seen, there = 0.0, 0.0, 0.0
    for row in rows:
        ids = row.unsqueeze(0)
        if chunk is None:
            logits = model(ids, use_cache=False).logits
        else:
            cache, parts = ContextCache(model.config.num_hidden_layers), []
            for start in range(0, ids.shape[1], chunk):
                piece = ids[:, start : start + chunk]
                held = cache.live_fraction() * start
                parts.append(model(piece, past_key_values=cache).logits)
                n = piece.shape[1]
                seen += sum(held + i for i in range(n))
                there += sum(start + i for i in range(n))
            logits = torch.cat(parts, 1)
        nats += float(cross_entropy(logits[0, :-1].float(), row[1:], reduction="sum"))
    return math.exp(nats / (rows.numel() - len(rows))), seen / there if there else None


def shifted(model: PreTrainedModel, gates: ContextGates, rows: Tensor, share: float) -> None:
    """Put all offsets where `share` of the context of rows is live."""
    starts = [gate.offset.clone() for gate in gates.gates]
    batches = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, len(row)).long()} for row in rows]

    def live(shift: float) -> float:
        for gate, start in zip(gates.gates, starts, strict=True):
            gate.offset.copy_(start + shift)
        found = live_by_layer(model, gates, batches)
        return sum(found) / len(found)

    gates.hold_(model)
    live(landed(live, share, 9, reach=4.0))
    release_(model)


def score(options: argparse.Namespace) -> None:
    """Take what the results lack."""
    results = Path(options.results)
    known = {(one["method"], one["share"]) for one in read(results)}
    loaded = compresso.load(options.model, dtype=torch.float32)
    model, rows = loaded.model, windows(loaded, Path(options.text), options.length, options.windows)
    facts = {"length": options.length, "windows": options.windows, "machine": machine()}

    def keep(method: str, share: float, perplexity: float, seen: float | None, **more: Any) -> None:
        line = {"method": method, "share": share, "perplexity": perplexity, "seen": seen, **more, **facts}
        results.parent.mkdir(exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{method} {share}: perplexity {perplexity:.2f}, seen {seen}", flush=True)

    if ("dense", 1.0) not in known:
        keep("dense", 1.0, scored(model, rows, None)[0], 1.0)
    for share in options.shares:
        for rule in options.rules:
            if (rule, share) not in known:
                evict_(model, parse(f"{rule}:{share}"))
                keep(rule, share, *scored(model, rows, options.chunk), chunk=options.chunk)
                release_(model)
        if options.gates and ("gates", share) not in known:
            records = json.loads((Path(options.gates) / "records.json").read_text("utf-8"))
            (patch,) = read_patches(records["patches"], Path(options.gates))
            trained = records["stages"]["context_gates"]
            gates = gates_of(patch, model)
            shifted(model, gates, windows(loaded, Path(options.data), options.length, LANDING), share)
            gates.hold_(model)
            perplexity, _ = scored(model, rows, None)
            batches = [
                {"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, len(row)).long()} for row in rows
            ]
            live = live_by_layer(model, gates, batches)
            release_(model)
            keep("gates", share, perplexity, sum(live) / len(live), updates=trained["updates"], by_layer=live)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the results; none where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def table(options: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    found: Sequence[dict[str, Any]] = read(Path(options.results))
    print("| share asked | method | seen | perplexity |\n|---:|---|---:|---:|")
    for one in sorted(found, key=lambda line: (-line["share"], line["perplexity"])):
        print(f"| {one['share']} | {one['method']} | {one['seen']:.3f} | {one['perplexity']:.2f} |")


def main() -> None:
    """Read options and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.set_defaults(go=train)
    one.add_argument("--updates", type=int, default=200)
    one.add_argument("--batch", type=int, default=4)
    one.add_argument("--micro-batch", type=int, default=2)
    one.add_argument("--lr", type=float, default=3e-3)
    one.add_argument("--folder", required=True)
    two = commands.add_parser("score")
    two.set_defaults(go=score)
    two.add_argument("--gates", default=None)
    two.add_argument("--text", required=True)
    two.add_argument("--windows", type=int, default=8)
    two.add_argument("--chunk", type=int, default=16)
    two.add_argument("--rules", nargs="*", default=RULES)
    two.add_argument("--shares", nargs="*", type=float, default=SHARES)
    for command in (one, two):
        command.add_argument("--model", required=True)
        command.add_argument("--data", required=True)
        command.add_argument("--length", type=int, default=512)
    three = commands.add_parser("table")
    three.set_defaults(go=table)
    for command in (two, three):
        command.add_argument("--results", default="benchmarks/results/context.jsonl")
    options = parser.parse_args()
    options.go(options)


if __name__ == "__main__":
    main()
