"""The first table on a real model: SmolLM2-135M-Instruct made sparse, rounded, or smaller, and what each of them cost.

    python benchmarks/real_model.py MODEL --scratch FOLDER [--only GLOB] [--parts perplexity tasks] [--updates 40]
    [--windows 16] [--limit 100] [--threads 1]

MODEL is a folder or the GGUF that `make demo-real` fetches; texts and benchmark files are those of COMPRESSO_DATA. One
line a cell is appended to results/real_model.jsonl as it ends, and a cell whose line is there is not done again, so
the table grows over as many calls as it takes. Checkpoints stay in FOLDER for the parts that come later.
`real_model_report.py` makes table and plot of the lines.

What is calibrated or trained on: the RedPajama sample, with Alpaca beside it where weights are trained. What is
measured on, and was never among that: WikiText-2's test split, a C4 sample, and tasks through lm_eval. All structured
methods take as many updates of as many tokens, those that learn gates or ranks theirs included.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import compresso
from common import RESULTS, machine
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.metrics.corpora import corpus
from compresso.metrics.perplexity import perplexity
from compresso.metrics.protocol import PerplexityProtocol
from compresso.metrics.tasks import task_measurements
from compresso.runner.recipe import read

LINES = RESULTS / "real_model.jsonl"
TEXT, ROWS = "datasets/text/redpajama_sample.jsonl.gz", "datasets/instruct/alpaca_subset.jsonl.gz"
SCORED = {"wikitext2": "wikitext2", "c4": "datasets/text/c4_sample_300.jsonl.gz"}
TASKS = ("arc_easy", "piqa", "winogrande", "hellaswag", "lambada")
CALIBRATION = {"examples": 24, "length": 512}
BATCH, LENGTH = 4, 256
"""Examples and tokens of an update: 1,024 tokens, shortened for a CPU."""

SPARSE = {
    "magnitude": ("magnitude/50", "magnitude"),
    "wanda": ("wanda/50", "wanda"),
    "sparsegpt": ("sparsegpt/50", "sparsegpt"),
    "owl": ("owl/70", "owl"),
}
ROUNDED = {
    "rtn, 4 bits": ("rtn/4-bit", "rtn", {"bits": 4, "group": 64}),
    "rtn, 3 bits": ("rtn/4-bit", "rtn", {"bits": 3, "group": 64}),
    "gptq, 4 bits": ("gptq/4-g128", "gptq", {"bits": 4, "group": 64, "symmetric": False, "act_order": True}),
    "gptq, 3 bits": ("gptq/4-g128", "gptq", {"bits": 3, "group": 64, "symmetric": False, "act_order": True}),
    "awq, 4 bits": ("awq/4-g128", "awq", {"bits": 4, "group": 64}),
    "awq, 3 bits": ("awq/4-g128", "awq", {"bits": 3, "group": 64}),
    "smoothquant, 8 bits": ("smoothquant/w8a8", "smoothquant", {}),
}
"""Groups of 64 inputs with a zero point in all: 128 does not divide a width of 576."""
STRUCTURED = (
    "shortgpt",
    "compresso",
    "llm-pruner",
    "gate-taylor",
    "minitron",
    "magnitude-structured",
    "bonsai",
    "loraprune",
    "lorashear",
    "contextual",
)
TRAINS = ("steps", "hold", "tune", "ramp", "shrink", "text_steps", "instruction_steps")
"""Knobs that count updates."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: a recipe with these overrides, and what it is called."""

    kind: str
    method: str
    setting: str
    recipe: str
    sets: tuple[str, ...]
    data: tuple[str, ...]
    keep: float | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".replace("%", "").replace(",", "").strip().replace(" ", "_")


def updates_of(recipe: str, updates: int) -> list[str]:
    """Overrides by which a recipe's training stages take `updates` together, shared as the recipe shares its own."""
    knobs = {
        f"stages.{stage}.{name}": int(value)
        for one in read(recipe)["stages"]
        for stage, values in one.items()
        for name, value in (values or {}).items()
        if name in TRAINS and value
    }
    total = sum(knobs.values())
    shares = {place: max(1, round(value * updates / total)) for place, value in knobs.items()}
    last = list(shares)[-1]
    shares[last] += updates - sum(shares.values())
    if "stages.learn_gates.hold" in shares:  # a twentieth of a short run is too little for gates to move
        shares["stages.learn_gates.hold"] = updates // 2
        shares["stages.recover.steps"] = updates - updates // 2
    return [f"{place}={value}" for place, value in shares.items()]


def small_batches(recipe: str) -> list[str]:
    """Overrides of what a stage reads at once, and of the precision it trains in."""
    sets: list[str] = []
    for one in read(recipe)["stages"]:
        for stage, values in one.items():
            given = values or {}
            if stage == "bonsai":  # its recipe's 64 sub-models in rounds of a twentieth take an hour of one core
                sets += [f"stages.{stage}.masks=16", f"stages.{stage}.round_share=0.1"]
                sets += [f"stages.{stage}.batches=1", f"stages.{stage}.batch={BATCH}"]
            elif any(name in given for name in TRAINS):
                sets += [f"stages.{stage}.precision=bf16", f"stages.{stage}.batch={BATCH}"]
                sets += [f"stages.{stage}.micro_batch={BATCH}"]
                if stage == "lorashear":  # which asks for the loss without each of 60 parts first
                    sets += [f"stages.{stage}.batches=2"]
            elif "batches" in given:
                sets += [f"stages.{stage}.batch={BATCH}", f"stages.{stage}.batches={min(16, int(given['batches']))}"]
            elif "micro_batch" in given:
                sets += [f"stages.{stage}.batch=16", f"stages.{stage}.micro_batch={BATCH}"]
    return sets


def cells(updates: int) -> Iterator[Cell]:
    """All rows, the ones that most is asked of first."""
    yield Cell("dense", "dense", "", "", (), ())
    window = (f"data.max_length={CALIBRATION['length']}", "data.limit=600")
    for percent in (50, 60):
        for method, (recipe, stage) in SPARSE.items():
            sets = [f"stages.{stage}.sparsity={percent / 100}"]
            if method != "magnitude":
                sets += [f"stages.{stage}.calibration.examples={CALIBRATION['examples']}", *window]
            yield Cell("sparse", method, f"{percent} %", recipe, tuple(sets), () if method == "magnitude" else (TEXT,))
    for percent in (20, 30, 50):
        for method in STRUCTURED:
            sets = [f"data.max_length={LENGTH}", "data.prompt=false", "data.pack=true", "data.limit=1500"]
            sets += [*small_batches(method), *updates_of(method, updates)]
            keep = round(1 - percent / 100, 2)
            yield Cell("structured", method, f"{percent} %", method, tuple(sets), (ROWS, TEXT), keep)
        if percent == 20:  # between, so that a table that is cut short has all kinds
            for method, (recipe, stage, knobs) in ROUNDED.items():
                sets = [f"stages.{stage}.{name}={value}" for name, value in knobs.items()]
                if stage != "rtn":
                    sets += [f"stages.{stage}.calibration.examples={CALIBRATION['examples']}", *window]
                    sets += [f"stages.{stage}.calibration.batch=1"]
                yield Cell("rounded", method, "", recipe, tuple(sets), () if stage == "rtn" else (TEXT,))


def made(cell: Cell, model: str, scratch: Path, root: Path) -> tuple[str, dict[str, Any]]:
    """The checkpoint of a cell, and the facts of the run that wrote it."""
    if cell.kind == "dense":
        return model, {}
    folder, facts = scratch / cell.name, scratch / f"{cell.name}.json"
    if not facts.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        result = compresso.run(
            cell.recipe,
            model,
            ",".join(str(root / one) for one in cell.data) or None,
            output=folder,
            keep=cell.keep,
            sets=cell.sets,
            measure="none",
            allow_collapsed=True,
            overwrite=True,
        )
        known = {
            "seconds": round(time.monotonic() - begun),
            "before": result.records["before"],
            "after": result.records["after"],
            "sets": list(cell.sets),
        }
        facts.write_text(json.dumps(known), "utf-8")
    return str(folder), json.loads(facts.read_text("utf-8"))


def perplexities(folder: str, root: Path, windows: int) -> dict[str, Any]:
    """Perplexity of both texts, with the standard error of its logarithm."""
    source = open_source(folder)
    model, tokenizer = load_model(source, torch.bfloat16), load_tokenizer(source)
    found: dict[str, Any] = {}
    for name, place in SCORED.items():
        texts = corpus(place if name == place else root / place, data_root=root)
        how = PerplexityProtocol(name, texts.split, "blank line", 512, bos="none", max_windows=windows)
        result = perplexity(model, tokenizer, texts.texts, how, batch_size=4)
        found[name] = {"value": result.value, "loss": result.loss, "stderr": result.stderr, "tokens": result.n_tokens}
    return found


def scores(folder: str, root: Path, limit: int) -> dict[str, Any]:
    """Accuracy on each task, with its standard error."""
    source = open_source(folder)
    model, tokenizer = load_model(source, torch.bfloat16), load_tokenizer(source)
    found = task_measurements(model, tokenizer, TASKS, limit=limit, batch_size=8, data_root=str(root))
    return {one.name: {"value": one.value, "stderr": one.stderr, "n": one.n} for one in found}


def main() -> None:
    """Do the cells that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", default="*", help="cells whose name fits, such as 'sparsegpt*'")
    parser.add_argument("--parts", nargs="+", default=["perplexity", "tasks"], choices=["perplexity", "tasks"])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    root = Path(os.environ["COMPRESSO_DATA"])
    torch.set_num_threads(given.threads)
    given.scratch.mkdir(parents=True, exist_ok=True)
    lines = LINES.read_text("utf-8").splitlines() if LINES.exists() else []
    done = {(one["cell"], one["part"]) for one in map(json.loads, lines)}
    for cell in cells(given.updates):
        for part in given.parts:
            if not fnmatch(cell.name, given.only) or (cell.name, part) in done:
                continue
            folder, facts = made(cell, given.model, given.scratch, root)
            found = (
                perplexities(folder, root, given.windows) if part == "perplexity" else scores(folder, root, given.limit)
            )
            line = {"cell": cell.name, "kind": cell.kind, "method": cell.method, "setting": cell.setting, "part": part}
            line |= {"found": found, "facts": facts, "updates": given.updates if cell.kind == "structured" else 0}
            with LINES.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"machine": machine()}) + "\n")
            print(cell.name, part, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
