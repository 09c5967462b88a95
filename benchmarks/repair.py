"""Every selector with and without the least-squares repair, no training, at 20, 30 and 50 % of the block parameters.

    COMPRESSO_DATA=folder python benchmarks/repair.py [--models nano babyllama SmolLM2_FOLDER] [--selectors ...]
        [--ratios 0.2 0.3 0.5] [--repairs none input residual] [--windows 40] [--tokens 20480] [--mix mixed|papers]
    python benchmarks/repair.py --report

A finished cell is a line of results/repair.jsonl and is not repeated, so that a run may be stopped at any time. A
selector decides once a cell's row; its repairs start from copies of what it left. Calibration is mixed (papers,
encyclopaedia, instructions, stories; the embedded model: its own documents), and no file of it is scored. Scores are of
text of windows of 512 tokens (or the model's context): WikiText-2's test text and the C4 sample; of babyllama, stories;
of nano, fresh documents of its world. `--report` writes results/repair.md of what is done.
"""

import argparse
import copy
import gzip
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from common import RESULTS, machine
from compresso.arch.base import arch_for
from compresso.core.budget import InfeasibleBudget
from compresso.core.plan import Plan
from compresso.data import nano, world
from compresso.edit.stock import as_stock
from compresso.job import Job
from compresso.metrics.divergence import DenseReference, divergence, reference
from compresso.stage import card

SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude_structured", {}),
    "gate-taylor": ("gate_taylor", {"floor": {"head": "keep"}, "batches": 8, "batch": 4}),
    "llm-pruner": ("llm_pruner", {"batch": 32, "micro_batch": 4}),
    "contextual": ("contextual", {"kinds": ["channel"], "batches": 8, "batch": 4}),
    "minitron": ("minitron", {"kinds": ["channel", "hidden"], "multiple_of": {"hidden": 8}, "batches": 8, "batch": 4}),
    "minitron/depth": ("minitron", {"kinds": ["layer", "channel"], "batches": 8, "batch": 4}),
    "bonsai": ("bonsai", {"masks": 32, "batches": 1, "batch": 4}),
    "shortgpt": ("drop_layers", {"batches": 8, "batch": 4}),
    "shortgpt/angular": ("drop_layers", {"score": "angular", "batches": 8, "batch": 4}),
    "shortgpt/attention": ("drop_layers", {"kinds": ["attention"], "batches": 8, "batch": 4}),
    "shortgpt/mlp": ("drop_layers", {"kinds": ["mlp"], "batches": 8, "batch": 4}),
    "ristretto": (
        "ristretto",
        {
            "evolution": {"generations": 8, "offspring": 6, "survivors": []},
            "batches": 6,
            "beginnings": 2,
            "judge_rows": 6,
            "finalists": 2,
            "judged": "repaired",
            "repaired_rows": 8,
        },
    ),
    "ristretto/gradients": (
        "ristretto",
        {
            "search": "dp",
            "by_gradients": 1,
            "batches": 6,
            "batch": 4,
            "micro_batch": 1,
            "beginnings": 2,
            "judge_rows": 6,
            "judged": "found",
        },
    ),
    "ristretto/dp": (
        "ristretto",
        {"search": "dp", "batches": 6, "beginnings": 4, "judge_rows": 6, "judged": "repaired"},
    ),
    "ristretto/found": (
        "ristretto",
        {"evolution": {"generations": 6, "offspring": 8}, "batches": 8, "beginnings": 3, "judge_rows": 6},
    ),
}
SIX_LAYERS = ("drop_layers", {"drop": 6, "batches": 4, "batch": 4})
"""ShortGPT with a number of layers in the place of a share; asked for as the selector `shortgpt/drop-6`."""
TEXTS = Path(os.environ.get("COMPRESSO_DATA", "")) / "datasets"
WIDTH = 512


def lines(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set."""
    with gzip.open(TEXTS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def mixture(kind: str) -> list[Iterator[str]]:
    """Texts to calibrate on, by kind."""
    papers = (row["text"] for row in lines("text/redpajama_sample") if row["domain"] == "arxiv")
    if kind == "papers":
        return [papers]
    encyclopaedia = (part for part in _whole("text/wikipedia_demo.txt.gz").split("\n") if len(part) > 400)
    instructions = (
        f"{row['instruction']}\n{row['input']}\n{row['output']}".replace("\n\n", "\n")
        for row in lines("instruct/dolly_3k")
    )
    if kind == "flagship":
        books = (row["text"] for row in lines("text/redpajama_sample") if row["domain"] == "book")
        code = (row["text"] for row in lines("text/redpajama_sample") if row["domain"] == "github")
        return [papers, instructions, books, code]
    stories = (row["text"] for row in lines("text/tinystories_sample"))
    return [papers, encyclopaedia, instructions, stories]


def windows(tokenizer: Any, texts: Iterator[str], width: int, most: int, apart: bool = False) -> list[list[int]]:
    """Full windows of a stream of texts; `apart` takes the first window of each text alone."""
    found: list[list[int]] = []
    stream: list[int] = []
    for text in texts:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if apart:
            if len(ids) >= width // 2:
                found.append(ids[:width])
        else:
            stream += ids
            while len(stream) >= width:
                found.append(stream[:width])
                stream = stream[width:]
        if len(found) >= most:
            break
    return found[:most]


class Subject:
    """A dense model with its calibration and what it is scored on."""

    def __init__(self, name: str, tokens: int, scored: int, mix: str, device: str = "cpu") -> None:
        babyllama = Path(os.environ.get("COMPRESSO_DATA", "")) / "models" / "babyllama-tok361"
        folder = {"nano": nano.path(), "babyllama": babyllama}.get(name, Path(name))
        self.name = name if name in ("nano", "babyllama") else folder.name
        self.last: tuple[tuple[str, float, int], Job, float] | None = None
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = as_stock(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        )
        width = min(WIDTH, int(self.model.config.max_position_embeddings))
        n = max(8, tokens // width)
        if name == "nano":
            documents = iter(world.documents(40 * n, 1))
            calibration = windows(self.tokenizer, documents, width, n)
            texts = {"world": iter(world.documents(40 * scored, 31_415_926))}
        elif name == "babyllama":
            stories = [row["text"] for row in lines("text/tinystories_sample")]
            calibration = windows(self.tokenizer, iter(stories[:1000]), width, n)
            texts = {"stories": iter(stories[1000:])}
        else:
            kinds = mixture(mix)
            parts = [
                windows(self.tokenizer, texts, width, -(-n // len(kinds)), apart=i == 0)
                for i, texts in enumerate(kinds)
            ]
            calibration = [window for together in zip(*parts, strict=True) for window in together][:n]
            texts = {
                "wikitext2": (row["text"] for row in lines("text/wikitext2_raw_test") if row["text"].strip()),
                "c4": (row["text"] for row in lines("text/c4_sample_300")),
            }
            if mix == "flagship":
                texts["stories"] = (row["text"] for row in lines("text/tinystories_sample"))
        self.rows = [{"input_ids": ids, "labels": ids} for ids in calibration]
        self.scored = {key: windows(self.tokenizer, text, width, scored) for key, text in texts.items()}
        self.reference: DenseReference = reference(
            self.model, [ids for of in self.scored.values() for ids in of[:4]], corpus="scored", batch_size=2
        )

    def job(self, folder: Path, seed: int) -> Job:
        """A fresh job on a copy of the model."""
        dense = self.model
        return Job(
            model=copy.deepcopy(dense),
            arch=arch_for(dense.config),
            tokenizer=None,
            rows=self.rows,
            held=self.rows[:2],
            plan=Plan(),
            records={},
            identity={},
            seed=seed,
            out=folder,
            quiet=True,
            original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype),
        )

    def scores(self, job: Job) -> dict[str, float]:
        """Perplexity by text, and divergence from the dense model."""
        found = {
            text: math.exp(job.task.score(job.model, [{"input_ids": ids, "labels": ids} for ids in of]).mean)
            for text, of in self.scored.items()
        }
        return {**found, "kl": divergence(job.model, self.reference)[0].value}


def selection_of(selector: str) -> tuple[str, dict[str, Any]]:
    """The stage of a selector, and its knobs but for the share that stays."""
    return SIX_LAYERS if selector == "shortgpt/drop-6" else SELECTORS[selector]


def selected(subject: Subject, selector: str, ratio: float, seed: int, folder: Path) -> tuple[Job, float]:
    """What a selector leaves, and its seconds. The last choice is kept, so that repairs and trainings share it; its
    model is to be copied before it is changed.
    """
    asked = (selector, ratio, seed)
    if subject.last is None or subject.last[0] != asked:
        stage, knobs = selection_of(selector)
        budget: Mapping[str, Any] = {} if "drop" in knobs else {"keep": 1 - ratio}
        started = time.monotonic()
        job = card(stage).type(**knobs, **budget)(subject.job(folder, seed))
        subject.last = asked, job, time.monotonic() - started
    return subject.last[1:]


def cells(
    subject: Subject, selector: str, ratio: float, repairs: Sequence[str], seed: int, folder: Path | None = None
) -> Iterator[dict[str, Any]]:
    """One selector at one ratio, with each repair. folder: of journals that outlast a killed run."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = folder or Path(temporary)
        chosen, seconds = selected(subject, selector, ratio, seed, scratch / "selector")
        kept = chosen.records[selection_of(selector)[0]]["kept_share_of_blocks"]
        for repair in repairs:
            begun, job = time.monotonic(), replace(chosen, model=copy.deepcopy(chosen.model))
            told: dict[str, Any] = {}
            if repair != "none":
                job = card("repair").type(target=repair)(replace(job, out=Path(scratch) / repair))
                facts = job.records["repair"]
                linears = [one for one in facts["linears"].values() if one["applied"]]
                told = {
                    "applied": facts["applied"],
                    "held_out_loss": facts.get("held_out_loss"),
                    "linears": f"{len(linears)}/{len(facts['linears'])}",
                    "alphas": _counts(one["alpha"] for one in linears),
                    "ridges": _counts(one["ridge"] for one in linears),
                    "calibration_tokens": facts["calibration_tokens"],
                    "tokens_wanted": facts["tokens_wanted"],
                }
            spent = round(time.monotonic() - begun, 1)
            yield {
                "repair": repair,
                "kept_share_of_blocks": kept,
                **subject.scores(job),
                **told,
                "seconds": {"selector": round(seconds, 1), "repair": spent},
            }


def _whole(name: str) -> str:
    with gzip.open(TEXTS / name, "rt", encoding="utf-8") as file:
        return file.read()


def _counts(values: Iterator[float]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[str(value)] = found.get(str(value), 0) + 1
    return dict(sorted(found.items()))


def report() -> None:
    """Write results/repair.md: of each model and ratio, what each repair leaves of a selector's damage."""
    done = [json.loads(line) for line in (RESULTS / "repair.jsonl").read_text("utf-8").splitlines()]
    text = [
        "# Selectors with and without repair, no training",
        "",
        "KL from the dense model in nats a token, and perplexity where no repair is applied / with target `input` /"
        " with target `residual`. A repair that does not lower the loss of held-out windows is taken back, which is"
        " marked by =. One seed. See `benchmarks/repair.py`.",
    ]
    runs = dict.fromkeys((line["model"], line["mix"], line["tokens"], line["windows"]) for line in done)
    for run in runs:
        here = [line for line in done if (line["model"], line["mix"], line["tokens"], line["windows"]) == run]
        texts = [name for name in ("wikitext2", "c4", "stories", "world") if name in here[0]]
        dense = next((line for line in here if line["selector"] == "dense"), None)
        where = f"{here[-1]['machine']['processor']}, {here[-1]['machine']['threads']} thread(s)"
        text += [
            "",
            f"## {run[0]}",
            "",
            f"{run[2]:,} tokens of calibration ({run[1]}), {run[3]} windows a text; {where}.",
        ]
        if dense is not None:
            text[-1] += " Dense: " + ", ".join(f"{name} {dense[name]:.2f}" for name in texts) + "."
        text += ["", "| removed | selector | KL | " + " | ".join(texts) + " |", "|---:|---|---|" + "---|" * len(texts)]
        cells_of: dict[tuple[float, str], dict[str, Any]] = {}
        for line in here:
            if line["selector"] != "dense":
                cells_of.setdefault((line["ratio"], line["selector"]), {})[line["repair"]] = line
        for (ratio, selector), by in sorted(cells_of.items(), key=lambda one: (one[0][0], _least(one[1]))):
            columns = [
                " / ".join(
                    "-"
                    if repair not in by
                    else f"{by[repair][name]:{shape}}" + ("" if by[repair].get("applied", True) else " =")
                    for repair in ("none", "input", "residual")
                )
                for name, shape in (("kl", ".3f"), *((name, ".4g") for name in texts))
            ]
            text.append(f"| {ratio:.0%} | {selector} | {' | '.join(columns)} |")
    (RESULTS / "repair.md").write_text("\n".join([*text, ""]), "utf-8")


def _least(by: Mapping[str, Mapping[str, Any]]) -> float:
    """The least divergence of a cell's repairs."""
    return min(line["kl"] for line in by.values())


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "babyllama"])
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--repairs", nargs="+", default=["none", "input", "residual"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--mix", choices=["mixed", "papers"], default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    if given.report:
        return report()
    torch.set_num_threads(given.threads)
    log = RESULTS / "repair.jsonl"
    keys = ("model", "selector", "ratio", "repair", "mix", "seed", "tokens", "windows")

    def done() -> set[tuple[Any, ...]]:
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
        return {tuple(row.get(key) for key in keys) for row in rows}

    def note(row: dict[str, Any]) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in row if key != "machine"}), flush=True)

    where = {key: value for key, value in machine().items() if key != "load_before"}
    for name in given.models:
        subject: Subject | None = None
        shown = name if name in ("nano", "babyllama") else Path(name).name
        whole = {"model": shown, "mix": given.mix, "seed": given.seed, "tokens": given.tokens, "windows": given.windows}
        for selector, ratio in [("dense", 0.0), *((one, ratio) for one in given.selectors for ratio in given.ratios)]:
            wanted = ["none"] if selector == "dense" else given.repairs
            cell = {**whole, "selector": selector, "ratio": ratio}
            left = [one for one in wanted if tuple({**cell, "repair": one}[key] for key in keys) not in done()]
            if not left:
                continue
            subject = subject or Subject(name, given.tokens, given.windows, given.mix)
            if selector == "dense":
                with tempfile.TemporaryDirectory() as scratch:
                    note({**cell, "repair": "none", **subject.scores(subject.job(Path(scratch), 0)), "machine": where})
                continue
            try:
                for row in cells(subject, selector, ratio, left, given.seed):
                    note({**cell, **row, "machine": where})
            except InfeasibleBudget as error:  # as of attentions alone at half of the blocks
                print(f"{shown}, {selector}, {ratio:.0%} removed: {error}", flush=True)
    return report()


if __name__ == "__main__":
    main()
