"""Compresso beside dropping layers on a real model: as many updates of as many tokens for each, at the same rate.

    python benchmarks/equal_updates.py MODEL --scratch FOLDER [--only GLOB] [--updates 120] [--gates 12]
        [--windows 40] [--threads 1] [--precision auto]
    python benchmarks/equal_updates.py --report

An update has 2,048 tokens: 4 windows of 512, of Alpaca and the RedPajama sample. Methods that learn gates spend
`--gates` of the updates on them. `compresso` starts them from scores of as many examples as its recipe does, 256, and
those of layers in the order of block influence; the others from a batch of 4 in place of 16, so 64 examples: there
`compresso-by-loss` starts layers from the loss without each, and in `compresso-one-rate` adapters learn at the
recovery's rate beside the gates.
Adapters of all recoveries have rank 32 and the rate 5e-4 at a hidden size of 4,096.
`repair` is the least-squares fit to the dense model before recovery: no update, and up to 128 windows of the same data.
Measured on WikiText-2 and the C4 sample, which nobody was trained on, in float32. A finished row is a line of
results/equal_updates.jsonl; checkpoints stay in FOLDER.
"""

import argparse
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import compresso
from common import RESULTS, high_water_mib, machine
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.metrics.corpora import corpus
from compresso.metrics.perplexity import perplexity
from compresso.metrics.protocol import PerplexityProtocol
from compresso.runner.recipe import read
from kept import stored
from real_model import ROWS, SCORED, TEXT

LINES = RESULTS / "equal_updates.jsonl"
BATCH, LENGTH = 4, 512
GATES = {"batch": BATCH, "micro_batch": BATCH}
SELECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shortgpt": ("shortgpt", "drop_layers", {"batches": 8, "batch": BATCH}),
    "compresso": ("compresso", "learn_gates", {**GATES, "score_batches": 64, "depth_batches": 4}),
    "compresso-64-examples": ("compresso", "learn_gates", {**GATES, "depth_order": "influence"}),
    "compresso-one-rate": ("compresso", "learn_gates", {**GATES, "depth_order": "influence", "lr": 5e-4}),
    "compresso-by-loss": ("compresso", "learn_gates", {**GATES, "depth_order": "loss"}),
    "llm-pruner": ("llm-pruner", "llm_pruner", {"batch": 32, "micro_batch": BATCH}),
    "gate-taylor": ("gate-taylor", "gate_taylor", {"batches": 8, "batch": BATCH}),
}
"""Of each method its recipe, and the stage that chooses with what is read by it."""


def gates_of(method: str, given: argparse.Namespace) -> int:
    """Updates of gates and adapters together; 0 where none learn."""
    return given.gates if method in SELECTS and SELECTS[method][1] == "learn_gates" else 0


def sets_of(method: str, repair: str, updates: int, gates: int, precision: str) -> list[str]:
    """Overrides of a method's recipe."""
    recipe, stage, knobs = SELECTS[method]
    knobs = {**knobs, **({"hold": gates, "precision": precision} if gates else {}), "repair": repair}
    trains = {"steps": updates - gates, "batch": BATCH, "micro_batch": BATCH, "precision": precision, "lr": 5e-4}
    found = [f"data.max_length={LENGTH}", "data.prompt=false", "data.pack=true", "data.limit=1500"]
    found += [f"stages.{stage}.{name}={value}" for name, value in knobs.items()]
    found += [f"stages.recover.{name}={value}" for name, value in trains.items()]
    assert [name for one in read(recipe)["stages"] for name in one if name not in ("repair",)] == [stage, "recover"]
    return found


def row(
    model: str, scratch: Path, root: Path, method: str, repair: str, keep: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Make a checkpoint, unless it is there, and score it."""
    gates = gates_of(method, given)
    name = f"{method}-{repair}-{keep}-{given.updates}" + (f"-{gates}" if gates else "")
    folder, facts = scratch / name, scratch / f"{name}.json"
    sets = sets_of(method, repair, given.updates, gates, given.precision)
    if not facts.exists():
        data = ",".join(str(root / one) for one in (ROWS, TEXT))
        begun_before = folder.with_name(f"{name}.partial").exists()
        result = compresso.run(
            SELECTS[method][0], model, data, output=folder, keep=keep, sets=sets, measure="none",
            allow_collapsed=True, overwrite=not begun_before, resume=begun_before,
        )  # fmt: skip
        blocks = [result.records[when]["parameters"]["blocks"] for when in ("after", "before")]
        repaired = result.records["stages"].get("repair", {})
        known = {
            "blocks": blocks[0] / blocks[1],
            "repair": {key: repaired[key] for key in ("applied", "held_out_loss") if key in repaired},
        }
        facts.write_text(json.dumps(known), "utf-8")
    return {**json.loads(facts.read_text("utf-8")), "sets": sets, "found": scored(str(folder), root, given.windows)}


def scored(folder: str, root: Path, windows: int) -> dict[str, Any]:
    """Perplexity of both texts, with the loss of each window."""
    source = open_source(folder)
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    found: dict[str, Any] = {}
    for name, place in SCORED.items():
        texts = corpus(place if name == place else root / place, data_root=root)
        how = PerplexityProtocol(name, texts.split, "blank line", LENGTH, bos="none", max_windows=windows)
        result = perplexity(model, tokenizer, texts.texts, how, batch_size=2)
        found[name] = {"value": result.value, "loss": result.loss, "stderr": result.stderr, "tokens": result.n_tokens}
    return found


def report() -> None:
    """Write results/equal_updates.md."""
    done = stored(LINES)
    one = done[-1]
    where = one["machine"]["cuda"] or f"{one['machine']['processor']}, {one['machine']['threads']} thread(s)"
    text = [
        "# Compresso beside dropping layers, after equal updates",
        "",
        f"SmolLM2-135M-Instruct; {one['updates']} updates of {BATCH * LENGTH:,} tokens for every method, one seed."
        f" Perplexity ± one standard error over windows; {where}. See `benchmarks/equal_updates.py`.",
        "",
        "| removed | method | updates of gates | repair | blocks left | WikiText-2 | C4 sample |",
        "|---:|---|---:|---|---:|---:|---:|",
    ]
    for line in sorted(done, key=lambda line: (-line["keep"], line["found"]["wikitext2"]["loss"])):
        numbers = [
            f"{line['found'][name]['value']:.1f} ± {line['found'][name]['value'] * line['found'][name]['stderr']:.1f}"
            for name in SCORED
        ]
        text.append(
            f"| {round(100 * (1 - line['keep']))} % | {line['method']} | {line.get('gates', 0)} |"
            f" {line['repair_target']} |"
            f" {100 * line.get('blocks', 1):.1f} % | {' | '.join(numbers)} |"
        )
    (RESULTS / "equal_updates.md").write_text("\n".join([*text, ""]), "utf-8")


def main() -> None:
    """Do what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--only", default="*", help="rows whose METHOD-REPAIR-KEEP fits, such as 'compresso-*-0.8'")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--gates", type=int, default=12, help="of the updates, those in which gates learn")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto", help="of training; rows say theirs in `sets`")
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    root = Path(os.environ["COMPRESSO_DATA"])
    if not given.report:
        given.scratch.mkdir(parents=True, exist_ok=True)
        where = {key: value for key, value in machine().items() if key != "load_before"}
        for keep in (1.0, *given.keeps):
            for method, repair in _order(keep):
                name = f"{method}-{repair}-{keep}"
                one = {"method": method, "repair_target": repair, "keep": keep, "updates": given.updates}
                one["gates"] = gates_of(method, given)
                known = any(all(line.get(key, 0) == value for key, value in one.items()) for line in stored(LINES))
                if known or not fnmatch(name, given.only):
                    continue
                if method == "dense":
                    found: dict[str, Any] = {"found": scored(given.model, root, given.windows)}
                else:
                    found = row(given.model, given.scratch, root, method, repair, keep, given)
                line = {**one, **found}
                with LINES.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "peak_mib": round(high_water_mib()), "machine": where}) + "\n")
                print(name, json.dumps(line["found"]), flush=True)
    report()


def _order(keep: float) -> list[tuple[str, str]]:
    """Methods and repairs at a size, those that most is asked of first."""
    if keep == 1.0:
        return [("dense", "none")]
    return [
        ("shortgpt", "none"),
        ("compresso", "residual"),
        ("compresso", "none"),
        ("compresso-64-examples", "residual"),
        ("compresso-64-examples", "none"),
        ("compresso-one-rate", "residual"),
        ("compresso-by-loss", "residual"),
        ("compresso-by-loss", "none"),
        ("shortgpt", "residual"),
        ("llm-pruner", "none"),
        ("gate-taylor", "none"),
    ]


if __name__ == "__main__":
    main()
