"""BESA beside Wanda and SparseGPT at half of the weights, on the same examples: perplexity, and by how much each window
differs.

    COMPRESSO_DATA=folder python benchmarks/besa.py [--models babyllama SmolLM2_FOLDER] [--methods ...] [--windows 40]
        [--tokens 65536] [--length 512] [--layers 30] [--seed 0] [--threads 1] [--report]

A finished cell is a line of results/besa.jsonl and is not repeated, so that a run may be stopped at any time. All
methods get the same calibration, examples of `--length` tokens (or the model's context), one at a time: of babyllama
stories, of other models a mixture (papers, encyclopaedia, instructions, stories). Scored are windows as long that no
method saw: stories; of other models WikiText-2's test text and the C4 sample. `--layers` has the first few pruned and
leaves the others whole, where a machine has no hours. `--report` writes results/besa.md of the lines.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import repair
from common import RESULTS, machine
from compresso.job import Job
from compresso.stage import card
from kept import stored
from repair import Subject

LINES = RESULTS / "besa.jsonl"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", {}),
    "wanda": ("wanda", {"sparsity": 0.5}),
    "sparsegpt": ("sparsegpt", {"sparsity": 0.5}),
    "besa": ("besa", {"reference": "model"}),
    "besa/row": ("besa", {"per": "row"}),
    "besa, Adam": ("besa", {"reference": "model", "optimizer": "adam"}),
    "besa/row, Adam": ("besa", {"per": "row", "optimizer": "adam"}),
    "besa/row, Adam, compensated": ("besa", {"per": "row", "optimizer": "adam", "compensate": True}),
    "besa/row, Adam, dense model": ("besa", {"per": "row", "optimizer": "adam", "reference": "model"}),
    "besa/row, 4 epochs": ("besa", {"per": "row", "epochs": 4}),
    "besa/row, Adam, 4 epochs": ("besa", {"per": "row", "optimizer": "adam", "epochs": 4}),
    "besa/row, compensated": ("besa", {"per": "row", "compensate": True}),
    "besa/row, 4 epochs, compensated": ("besa", {"per": "row", "epochs": 4, "compensate": True}),
    "sparsegpt, 4 bits": ("sparsegpt", {"sparsity": 0.5, "bits": 4}),
    "besa/row, 4 bits": ("besa", {"per": "row", "bits": 4}),
    "besa/row, 4 bits, compensated": ("besa", {"per": "row", "bits": 4, "compensate": True}),
}
KEYS = ("model", "method", "tokens", "windows", "seed", "length", "layers")


def losses(job: Job, windows: Sequence[Sequence[int]]) -> list[float]:
    """Mean next-token loss of each window."""
    found: list[float] = []
    with torch.no_grad():
        for ids in windows:
            given = torch.tensor([ids])
            logits = job.model(input_ids=given).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, given[0, 1:])))
    return found


def measured(subject: Subject, method: str, seed: int, layers: int | None) -> dict[str, Any]:
    """One cell: what the method did, how long it took, the losses by text. layers: worked on, from the first."""
    stage, knobs = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        job, begun = subject.job(Path(folder), seed), time.monotonic()
        busy = time.process_time()
        facts: dict[str, Any] = {}
        if stage:
            where = {} if layers is None else {"where": {"layers": (0, layers)}}
            job = card(stage).type(**knobs, **where, calibration={"examples": len(subject.rows), "batch": 1})(job)
            told = job.records[stage]
            facts = {"sparsity": told["sparsity"]}
            if stage == "besa":
                facts |= {"blocks": told["blocks"], "shares": _by_place(told["of"])}
        spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - busy, 1)}
        scored = {text: losses(job, windows) for text, windows in subject.scored.items()}
    return {**facts, **spent, "losses": scored}


def _by_place(of: Mapping[str, Any]) -> dict[str, list[float]]:
    """Share of zeros of each kind of linear, by layer."""
    found: dict[str, list[float]] = {}
    for name, one in of.items():
        found.setdefault(name.rpartition(".")[2], []).append(round(one["share"], 4))
    return found


def paired(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean difference over windows, and its standard error."""
    apart = torch.tensor(mine, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return float(apart.mean()), float(apart.std() / math.sqrt(len(apart)))


def report(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of results/besa.md."""
    where = cells[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    yield "# BESA beside Wanda and SparseGPT at half of the weights"
    yield ""
    yield (
        f"`benchmarks/besa.py`, {where['processor']}, {where['threads']} thread(s) of {where['cores']} cores;"
        f" {versions}. No recovery. Perplexity ± standard error over windows; differences are of mean losses in nats a"
        " token, paired by window, ± one standard error: below 0 is better than that method."
    )
    shared = [key for key in KEYS if key != "method"]
    for which in dict.fromkeys(tuple(c[key] for key in shared) for c in cells):
        here = {c["method"]: c for c in cells if tuple(c[key] for key in shared) == which}
        of = dict(zip(shared, which, strict=True))
        pruned = "all layers" if of["layers"] is None else f"the first {of['layers']} layers alone"
        yield ""
        yield f"## {of['model']}, {pruned}"
        yield ""
        yield (
            f"{of['tokens']:,} tokens of calibration in examples of {of['length']}; {of['windows']} windows as long of"
            f" each text scored; seed {of['seed']}."
        )
        yield ""
        texts = list(next(iter(here.values()))["losses"])
        head = [f"{text} | against wanda | against sparsegpt" for text in texts]
        yield f"| method | zeros | {' | '.join(head)} | CPU s |"
        yield f"|---|---:|{'---:|' * 3 * len(texts)}---:|"
        for method in (name for name in METHODS if name in here):
            cell, shown = here[method], list[str]()
            for text in texts:
                own = cell["losses"][text]
                mean, error = paired(own, [0.0] * len(own))
                shown.append(f"{math.exp(mean):.3g} ± {math.exp(mean) * error:.2g}")
                for other in ("wanda", "sparsegpt"):
                    if other == method or other not in here:
                        shown.append("-")
                        continue
                    mean, error = paired(own, here[other]["losses"][text])
                    shown.append(f"{mean:+.4f} ± {error:.4f}")
            zeros = f"{100 * cell['sparsity']:.2f} %" if "sparsity" in cell else "-"
            yield f"| {method} | {zeros} | {' | '.join(shown)} | {cell['cpu_seconds']:,.0f} |"
        yield ""
        yield from verdict(here, texts)
    yield ""


def verdict(here: Mapping[str, Mapping[str, Any]], texts: Sequence[str]) -> Iterator[str]:
    """Whether BESA is below Wanda and SparseGPT, the goal, as published and with its weights compensated."""
    if not {"wanda", "sparsegpt"} <= here.keys():
        yield "The goal, perplexity below Wanda's and SparseGPT's, is open: one of them is not measured."
        return
    for words, wanted in (("as published", False), ("compensated, which is ours", True)):
        names = [name for name in here if name.startswith("besa") and "bits" not in name]
        for name in (name for name in names if ("compensated" in name) == wanted):
            said: list[str] = []
            for other in ("wanda", "sparsegpt"):
                apart = [paired(here[name]["losses"][text], here[other]["losses"][text]) for text in texts]
                sure = all(mean < -2 * error for mean, error in apart)
                said.append(f"{'below' if sure else 'not surely below'} {other}")
            yield f"- {name} ({words}): {', '.join(said)} (two standard errors, every text)."


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["babyllama"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        (RESULTS / "besa.md").write_text("\n".join(report(stored(LINES))), "utf-8")
        return
    torch.set_num_threads(given.threads)
    repair.WIDTH = given.length
    for name in given.models:
        subject: Subject | None = None
        shown = name if name == "babyllama" else Path(name).name
        for method in given.methods:
            asked = {key: vars(given)[key] for key in KEYS if key not in ("model", "method")}
            cell = {"model": shown, "method": method, **asked}
            if tuple(cell[key] for key in KEYS) in {tuple(row[key] for key in KEYS) for row in stored(LINES)}:
                continue
            subject = subject or Subject(name, given.tokens, given.windows, "mixed")
            row = {**cell, **measured(subject, method, given.seed, given.layers), "machine": machine()}
            with LINES.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            means = {text: round(math.exp(sum(of) / len(of)), 3) for text, of in row["losses"].items()}
            print(shown, method, means, row["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
