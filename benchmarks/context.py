"""What a cache that forgets costs and saves: learned gates beside rules, at equal shares of the context, by perplexity,
by facts that are asked late, by bytes and by decode speed.

    python benchmarks/context.py train --model MODEL --data TEXTS --updates 200 --folder FOLDER
    python benchmarks/context.py train --what gates-adapters (or adapters) --model MODEL ...
    python benchmarks/context.py score --model MODEL --gates FOLDER --adapted FOLDER FOLDER --data TEXTS --text TEXTS
    python benchmarks/context.py recall --model MODEL [--embedded] [--gates FOLDER --data TEXTS]
    python benchmarks/context.py speed --model MODEL --contexts 1024 4096 --filled --rules window keydiff gates
    python benchmarks/context.py --report

Gates are trained once, on a frozen body, for half of the context, and for other shares all their offsets are shifted on
training texts. With adapters, gates and dense alone learn as many updates of the same texts. Rules read a window in
chunks, and the cache is cut after each; so their queries see up to a chunk more than the share, and "seen"
is what queries could attend to of what came before them, counted alike for all. A line of the results
(results/context.jsonl) is one method at one share of windows of one length; those that are there are not taken again.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import compresso
from common import RESULTS, machine
from compresso.edit.context_attention import release_
from compresso.edit.context_cache import ContextCache
from compresso.edit.context_gates import ContextGates, gates_of
from compresso.edit.context_landing import land_, live_by_layer
from compresso.edit.evict import evict_, parse
from compresso.edit.patches import read_patches
from compresso.loading import Loaded
from context_recall import answered, items, kind_of
from context_report import report
from context_speed import Turn, turn, whole_bytes

SHARES = (0.75, 0.5, 0.25)
RULES = ("window", "keydiff", "knorm", "h2o")
LANDING = 6
ADAPTED = " + LoRA"
"""Of methods whose model learned, too, by adapters that lie in its weights."""


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
    """Train gates alone, gates with adapters, or adapters alone, through a run."""
    loop = {
        "steps": options.updates,
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "lr": options.lr,
        "lr_schedule": "cosine",
        "warmup": 3,
        "clip": 1.0,
        "save_every": 5,
        "precision": options.precision,
    }
    gates = {
        "keep_context": 0.5,
        "train": "gates" if options.what == "gates" else "lora",
        "judged_by": "layers" if options.what == "gates" else "task",
        "gating": "least",
        "alpha_start": 2.0,
        "alpha_end": 16.0,
        "alpha_even": True,
        "offset": 3.5,
        "spread": 0.5,
        "gamma": options.gamma,
        "dual_rate": options.dual_rate,
        "gate_lr": options.gate_lr,
        "offset_lr": options.offset_lr,
        "landing": LANDING,
    }
    stages = [{"recover": loop}] if options.what == "adapters" else [{"context_gates": {**loop, **gates}}]
    data = {"max_length": options.length, "prompt": False, "pack": True, "held": 2}
    raw = {"name": "context-benchmark", "data": data, "stages": stages}
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
    batches = [{"input_ids": row.unsqueeze(0), "attention_mask": row.new_ones(1, len(row))} for row in rows]
    gates.hold_(model)
    land_(model, gates, batches, share)
    release_(model)


@dataclass(frozen=True)
class Held:
    """A model with one way to keep its cache.

    Args:
        method: "dense", a rule, or "gates"; ADAPTED behind it where adapters learned, too.
        share: of the context that was asked for.
        model: that has it.
        gates: of "gates".
        facts: about the method, for its lines.
    """

    method: str
    share: float
    model: PreTrainedModel
    gates: ContextGates | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def methods(loaded: Loaded, options: argparse.Namespace, part: str) -> Iterator[Held]:
    """Each method at each share that the results lack, put on its model; dense first."""
    lines = [one for one in read(Path(options.results)) if of(one, options, part)]
    known = {(one["method"], one["share"]) for one in lines if one["length"] == options.length}
    model = loaded.model
    if ("dense", 1.0) not in known:
        yield Held("dense", 1.0, model)
    for share in options.shares:
        for rule in options.rules:
            if (rule, share) not in known:
                evict_(model, parse(f"{rule}:{share}"))
                yield Held(rule, share, model)
                release_(model)
        if options.gates and ("gates", share) not in known:
            yield from gated(loaded, options.gates, options, share)
    for folder in options.adapted:
        run = json.loads((Path(folder) / "records.json").read_text("utf-8"))["stages"]
        share = run["context_gates"]["keep_context"] if "context_gates" in run else 1.0
        if (("dense" if share == 1 else "gates") + ADAPTED, share) in known:
            continue
        adapted = compresso.load(folder, dtype=torch.float32, device=options.device)
        if share == 1:
            yield Held("dense" + ADAPTED, share, adapted.model, facts={"updates": run["recover"]["updates"]})
        else:
            release_(adapted.model)
            yield from gated(adapted, folder, options, share, ADAPTED)


def gated(loaded: Loaded, folder: str, options: argparse.Namespace, share: float, remark: str = "") -> Iterator[Held]:
    """A model with the gates of a run, at the run's own share or shifted to another."""
    model = loaded.model
    records = json.loads((Path(folder) / "records.json").read_text("utf-8"))
    (patch,) = read_patches(records["patches"], Path(folder))
    gates = gates_of(patch, model).to(model.device)
    run = records["stages"]["context_gates"]
    if share != run["keep_context"]:  # the run's own gates are there already
        seen = windows(loaded, Path(options.data), options.length, LANDING)
        shifted(model, gates, seen.to(model.device), share)
    gates.hold_(model)
    yield Held("gates" + remark, share, model, gates, {"updates": run["updates"]})
    release_(model)


def of(line: Mapping[str, Any], options: argparse.Namespace, part: str) -> bool:
    """Whether a line of the results is of a part and model."""
    return (line["part"], line["model"]) == (part, Path(options.model).name)


def noted(options: argparse.Namespace, part: str, held: Held, **numbers: Any) -> None:
    """Append a line to the results."""
    results = Path(options.results)
    line = {"part": part, "model": Path(options.model).name, "method": held.method, "share": held.share}
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **numbers, **held.facts, "machine": machine()}) + "\n")
    print(held.method, held.share, {name: value for name, value in numbers.items() if name != "by_layer"}, flush=True)


def score(options: argparse.Namespace) -> None:
    """Perplexity of texts."""
    loaded = compresso.load(options.model, dtype=torch.float32, device=options.device)
    rows = windows(loaded, Path(options.text), options.length, options.windows).to(loaded.model.device)
    facts = {"length": options.length, "windows": options.windows}
    for held in methods(loaded, options, "text"):
        model = held.model
        if held.gates is None:
            chunk = None if held.share == 1 else options.chunk
            perplexity, seen = scored(model, rows, chunk)
            noted(options, "text", held, perplexity=perplexity, seen=seen or 1.0, chunk=chunk, **facts)
            continue
        perplexity, _ = scored(model, rows, None)
        batches = [{"input_ids": row.unsqueeze(0), "attention_mask": row.new_ones(1, len(row))} for row in rows]
        live = live_by_layer(model, held.gates, batches)
        found = {"perplexity": perplexity, "seen": sum(live) / len(live), "by_layer": live}
        noted(options, "text", held, **found, **facts)


def recall(options: argparse.Namespace) -> None:
    """Facts early in the context, asked late."""
    loaded = compresso.load(options.model, dtype=torch.float32, device=options.device)
    assert loaded.tokenizer is not None
    kind = kind_of(options.embedded, options.seed)
    asked = items(loaded.tokenizer, kind, options.items, options.length, options.facts, options.seed)
    for held in methods(loaded, options, "recall"):
        right, live, size = answered(held.model, asked, options.chunk, options.batch)
        numbers = {"right": int(right.sum()), "items": len(right), "facts": options.facts, "live": live, "bytes": size}
        noted(options, "recall", held, **numbers, length=options.length, chunk=options.chunk, seed=options.seed)


def speed(options: argparse.Namespace) -> None:
    """Bytes of the cache and decode tokens/s; the methods take turns at each size, the median of rounds counts."""
    loaded = compresso.load(options.model, dtype=torch.float32, device=options.device)
    lines = [one for one in read(Path(options.results)) if of(one, options, "speed")]
    known = {(one["method"], one["context"], one["batch"]) for one in lines}
    for context, batch in product(options.contexts, options.batches):
        due = [name for name in ("dense", *options.rules) if (name, context, batch) not in known]
        size = whole_bytes(loaded.model, batch, context)
        if size > options.most * 1e9:
            print(f"{context} tokens, batch {batch}: the whole cache takes {size / 1e9:.1f} GB; left out", flush=True)
            continue
        timed: dict[str, list[Turn]] = {name: [] for name in due}
        for _, name in product(range(options.rounds), due):
            timed[name].append(turn(loaded.model, name, options, batch, context))
        for name, turns in timed.items():
            rates = [batch * options.new_tokens / one.seconds for one in turns]
            numbers = {"context": context, "batch": batch, "tokens_per_s": median(rates), "rates": rates}
            numbers |= {"bytes": turns[0].size, "live": turns[0].live, "new_tokens": options.new_tokens}
            held = Held(name, 1.0 if name == "dense" else options.share, loaded.model)
            noted(options, "speed", held, **numbers, filled=options.filled)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the results; none where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    """Read options and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report",
        action="store_true",
        help="write context.md and context.html of the results, after a command or alone",
    )
    commands = parser.add_subparsers()
    one = commands.add_parser("train")
    one.set_defaults(go=train)
    one.add_argument("--what", choices=("gates", "gates-adapters", "adapters"), default="gates")
    one.add_argument("--updates", type=int, default=200)
    one.add_argument("--precision", choices=("auto", "no", "bf16"), default="auto")
    one.add_argument("--batch", type=int, default=1)
    one.add_argument("--micro-batch", type=int, default=1)
    one.add_argument("--lr", type=float, default=5e-4)
    one.add_argument("--gate-lr", type=float, default=None, help="--lr where none is given")
    one.add_argument("--offset-lr", type=float, default=3e-2)
    one.add_argument("--gamma", type=float, default=2e-2)
    one.add_argument("--dual-rate", type=float, default=2e-3)
    one.add_argument("--folder", required=True)
    two = commands.add_parser("score")
    two.set_defaults(go=score)
    two.add_argument("--text", required=True)
    two.add_argument("--windows", type=int, default=8)
    three = commands.add_parser("recall")
    three.set_defaults(go=recall)
    three.add_argument("--embedded", action="store_true", help="facts in the words of the embedded model's world")
    three.add_argument("--items", type=int, default=32)
    three.add_argument("--facts", type=int, default=4)
    three.add_argument("--batch", type=int, default=8)
    three.add_argument("--seed", type=int, default=0)
    four = commands.add_parser("speed")
    four.set_defaults(go=speed)
    four.add_argument("--contexts", nargs="*", type=int, default=(1024, 2048, 4096))
    four.add_argument("--batches", nargs="*", type=int, default=(1, 8))
    four.add_argument("--new-tokens", type=int, default=16)
    four.add_argument("--rounds", type=int, default=3)
    four.add_argument("--share", type=float, default=0.5)
    four.add_argument("--filled", action="store_true", help="fill caches with random keys instead of reading prompts")
    four.add_argument("--most", type=float, default=4.0, help="GB of the whole cache, above which a size is left out")
    for command in (one, two, three):
        command.add_argument("--data", default=None, help="training texts, JSON lines; of gates")
        command.add_argument("--length", type=int, default=512)
    for command in (two, three):
        command.add_argument("--gates", default=None)
        command.add_argument("--adapted", nargs="*", default=(), help="folders of runs in which adapters learned")
        command.add_argument("--chunk", type=int, default=16)
        command.add_argument("--shares", nargs="*", type=float, default=SHARES)
    for command in (two, three, four):
        command.add_argument("--rules", nargs="*", default=RULES)
    for command in (two, three, four):
        command.add_argument("--device", default="cpu")
    for command in (one, two, three, four):
        command.add_argument("--model", required=True)
    for command in (parser, two, three, four):
        command.add_argument("--results", default=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results = getattr(options, "results", str(RESULTS / "context.jsonl"))
    if not hasattr(options, "go") and not options.report:
        parser.error("give a command, --report, or both")
    if hasattr(options, "go"):
        options.go(options)
    if options.report:
        report(read(Path(options.results)))


if __name__ == "__main__":
    main()
