"""What is best at a size, without training and after equal training: every selector, with and without repair, and
ristretto, on several seeds.

    COMPRESSO_DATA=folder python benchmarks/flagship.py --updates 0 --scratch FOLDER [--models nano SMOLLM2_FOLDER]
        [--ratios 0.2 0.3 0.5] [--selectors ...] [--repairs none residual] [--seeds 0 1 2] [--windows 16]
        [--tokens 24576] [--device cpu] [--threads 1] [--limit-s SECONDS]
    ... --updates 120 [--selectors, of `flagship_trained.py`]   (or both tables at once: --updates 0 120)
    python benchmarks/flagship.py --report

Calibration is papers, instructions, books and code (the embedded model: its own documents), and what is scored is of
other kinds: WikiText-2, the C4 sample and stories; runs of eight tokens that both have are counted. A seed draws other
rows for what is drawn. Scores are the perplexity of each text, and the KL divergence from the dense model in nats a
token, window by window, so that methods are compared in pairs. A finished row is a line of results/flagship.jsonl and
is not done again; what a search had found stays in FOLDER, for the row with training behind it. With updates, every row
is trained for as many of them before it is scored; see `flagship_trained.py`.

Torch-Pruning is run from its own package where it is installed (`opponents.py`).

The report says for each ratio which method is nearest to dense by KL, and by how much the next is farther, in pairs of
windows and seeds: won is more than 6 %, with the 95 % interval of the difference off zero, over several seeds.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flagship_trained
import opponents
from common import high_water_mib, machine
from compresso.job import Job
from compresso.metrics.divergence import divergence, reference
from flagship_report import LINES, report
from kept import stored
from repair import SELECTORS, Subject, cells

KEYS = ("model", "selector", "ratio", "repair", "seed", "tokens", "windows", "updates")
COMPARED = 4
"""Windows of each text whose divergence is taken, one by one."""
PLACES = 256
"""Positions of each of them."""
OPPONENTS = {"torch-pruning": True, "torch-pruning/ffn": False}
"""Selectors of another package, and whether hidden dimensions leave, too."""
ORDER = (
    "ristretto",
    "ristretto/dp",
    "ristretto/gradients",
    "ristretto/found",
    "shortgpt",
    "gate-taylor",
    "llm-pruner",
    "torch-pruning/ffn",
    "minitron",
    "minitron/depth",
    "shortgpt/angular",
    "shortgpt/attention",
    "shortgpt/mlp",
    "contextual",
    "magnitude",
    "torch-pruning",
    "bonsai",
)


class Judged(Subject):
    """A subject whose divergence is taken window by window."""

    def __init__(self, name: str, tokens: int, scored: int, device: str = "cpu") -> None:
        super().__init__(name, tokens, scored, "flagship", device)
        size = 4 * int(self.model.config.vocab_size) * PLACES
        self.references = {
            text: [reference(self.model, [ids], corpus=text, batch_size=1, max_bytes=size) for ids in of[:COMPARED]]
            for text, of in self.scored.items()
        }

    def scores(self, job: Job) -> dict[str, Any]:
        """Perplexity and mean divergence by text, and divergence by window."""
        found: dict[str, Any] = {
            text: math.exp(job.task.score(job.model, [{"input_ids": ids, "labels": ids} for ids in of]).mean)
            for text, of in self.scored.items()
        }
        windows = {
            text: [round(divergence(job.model, one)[0].value, 5) for one in of] for text, of in self.references.items()
        }
        mean = statistics.fmean(value for of in windows.values() for value in of)
        return {**found, "kl": mean, "kl_windows": windows}


def overlap(subject: Subject) -> float:
    """Share of runs of eight tokens of the scored windows that calibration has, too."""

    def runs(windows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        return [tuple(window[i : i + 8]) for window in windows for i in range(len(window) - 7)]

    seen = set(runs([row["input_ids"] for row in subject.rows]))
    scored = runs([ids for of in subject.scored.values() for ids in of])
    return sum(run in seen for run in scored) / max(len(scored), 1)


def run(given: argparse.Namespace) -> None:
    """Do what is missing, seeds last, so that a table that is cut short has all methods."""
    torch.set_num_threads(given.threads)
    begun = time.monotonic()
    where = {key: value for key, value in machine().items() if key != "load_before"}
    for name in given.models:
        subject: Subject | None = None
        shown = name if name in ("nano", "babyllama") else Path(name).name
        for seed, ratio, updates, selector in _order(given):
            cell = {"model": shown, "selector": selector, "ratio": ratio, "seed": seed}
            cell |= {"tokens": given.tokens, "windows": given.windows, "updates": updates}
            known = {tuple({"updates": 0, **row}[key] for key in KEYS) for row in stored(LINES)}
            wanted = ["none"] if selector == "dense" or selector in OPPONENTS else given.repairs
            left = [one for one in wanted if tuple({**cell, "repair": one}[key] for key in KEYS) not in known]
            if not left or time.monotonic() - begun > given.limit_s:
                continue
            subject = subject or Judged(name, given.tokens, given.windows, given.device)
            scratch = _scratch(given.scratch / shown, selector, ratio, seed, given.tokens)
            shared = _scratch(given.scratch / shown, selector, 0.0, seed, given.tokens)
            _with_bank(scratch, shared)
            for row in _scored(subject, selector, ratio, left, seed, scratch, cell["updates"]):
                line = {**cell, **row, "peak_mib": round(high_water_mib()), "machine": where}
                with LINES.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps({key: line[key] for key in line if key != "machine"}), flush=True)
            _kept_bank(scratch, shared)


def _order(given: argparse.Namespace) -> Iterator[tuple[int, float, int, str]]:
    yield given.seeds[0], 0.0, 0, "dense"
    for seed in given.seeds:
        for ratio in given.ratios:
            for selector in given.selectors:  # one after another where they share a selection
                for updates in given.updates:
                    if selector in (flagship_trained.ORDER if updates else (*SELECTORS, *OPPONENTS)):
                        yield seed, ratio, updates, selector


def _scored(
    subject: Judged, selector: str, ratio: float, repairs: Sequence[str], seed: int, scratch: Path, updates: int
) -> Iterator[dict[str, Any]]:
    """A selector's rows; one that fails has its reason in the place of scores."""
    begun = time.monotonic()
    if selector == "dense":
        found = subject.scores(subject.job(Path("unused"), seed))
        yield {"repair": "none", **found, "overlap": overlap(subject)}
        return
    try:
        if selector in OPPONENTS:
            yield _opponent(subject, selector, ratio, seed)
            return
        if updates:
            for repair in repairs:
                begun, own = time.monotonic(), scratch / f"{selector.replace('/', '-')}-{repair}-{updates}"
                chosen = scratch / "selector"
                job, told = flagship_trained.trained(subject, selector, updates, ratio, repair, seed, own, chosen)
                seconds = round(time.monotonic() - begun, 1)
                yield {"repair": repair, **told, **subject.scores(job), "seconds": seconds}
                shutil.rmtree(own, ignore_errors=True)
            return
        yield from cells(subject, selector, ratio, repairs, seed, scratch)
    except Exception as error:  # a table names what cannot be done and goes on
        for repair in repairs:
            yield {"repair": repair, "failed": str(error)[:200], "seconds": round(time.monotonic() - begun, 1)}


def _scratch(folder: Path, selector: str, ratio: float, seed: int, tokens: int) -> Path:
    """Where journals of a selection lie, with training behind it or without."""
    name = flagship_trained.SELECTED.get(selector, selector)
    return folder.with_name(f"{folder.name}-{name.replace('/', '-')}-{ratio}-{seed}-{tokens}")


def _with_bank(scratch: Path, shared: Path) -> None:
    """Take the bank that another ratio has finished; it is of a model and its calibration alone."""
    if shared.exists() and not (mine := scratch / "selector" / "bank").exists():
        shutil.copytree(shared, mine)


def _kept_bank(scratch: Path, shared: Path) -> None:
    """Leave the finished bank to other ratios."""
    if (mine := scratch / "selector" / "bank").exists() and not shared.exists():
        shutil.copytree(mine, partial := shared.with_name(f"{shared.name}.{os.getpid()}"))
        partial.rename(shared)


def _opponent(subject: Judged, selector: str, ratio: float, seed: int) -> dict[str, Any]:
    """Torch-Pruning's row; it leaves no plan for a repair to read."""
    begun = time.monotonic()
    model, kept = opponents.torch_pruning(subject.model, subject.rows, 1 - ratio, hidden=OPPONENTS[selector])
    seconds = round(time.monotonic() - begun, 1)
    job = replace(subject.job(Path("unused"), seed), model=model)
    return {"repair": "none", "kept_share_of_blocks": kept, **subject.scores(job), "seconds": {"selector": seconds}}


def main() -> None:
    """Run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, nargs="+", default=[0], help="of 2,048 tokens, of every method")
    parser.add_argument("--models", nargs="+", default=["nano"])
    parser.add_argument("--selectors", nargs="+", help="or methods of `flagship_trained.py`; all by default")
    parser.add_argument("--scratch", type=Path, default=Path("flagship"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--repairs", nargs="+", default=["none", "residual"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which no other row is begun")
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    able = [*SELECTORS, *OPPONENTS] if 0 in given.updates else list[str]()
    able += flagship_trained.ORDER if any(given.updates) else ()
    given.selectors = given.selectors or [
        *dict.fromkeys(one for one in (*ORDER, *flagship_trained.ORDER) if one in able)
    ]
    if unknown := [one for one in given.selectors if one not in able]:
        parser.error(f"--selectors {' '.join(unknown)}: wanted some of {' '.join(able)}")
    if not given.report:
        run(given)
    report()


if __name__ == "__main__":
    main()
