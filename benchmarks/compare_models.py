"""Dense, magnitude, gate-Taylor and Compresso on several models, equal updates: what was kept, what it costs, how fast
it runs.

    python benchmarks/compare_models.py [--models nano stories260K babyllama-tok361] [--keep 0.7] [--updates 300]
    [--seed 0]

Besides the embedded nano model there are the models under COMPRESSO_DATA, which are pruned with text of theirs; one
that is absent is left out with a word. Each model's report goes to results/models_NAME.json, the same file that
`compresso compare` reads, and all of them into the table results/models.md. `--only-table` writes the table anew from
what is there.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import RESULTS
from compresso.data import nano
from compresso.metrics.record import ModelResults, Report
from compresso.metrics.report_file import report_path, write_report_file
from compresso.report.read import read_results
from compresso.runner.recipe import override, read, with_knob
from compresso.runner.run import run

METHODS = ("magnitude-structured", "gate-taylor", "compresso")
STORIES = "datasets/text/tinystories_sample.jsonl.gz"
COLUMNS = (
    ("parameters/total", "parameters", "{:,.0f}"),
    ("bytes/disk", "MB on disk", "{:.2f}"),
    ("held/perplexity", "held-out perplexity", "{:.3f}"),
    ("kl", "KL from dense, nats", "{:.3f}"),
    ("top1_agreement", "same top token", "{:.3f}"),
    ("degenerate", "broken texts", "{:.0%}"),
    ("decode_speedup/batch1", "decode speed-up", "{:.2f}"),
    ("decode_bound/batch1", "bytes bound (estimated)", "{:.2f}"),
)


@dataclass(frozen=True)
class Case:
    """A model, the data it is pruned with, and which configuration of each recipe is for it."""

    model: Path
    data: str
    configuration: str


def cases() -> dict[str, Case]:
    """Models that are here, by name."""
    found = {"nano": Case(nano.path(), "world", "/nano")}
    root = os.environ.get("COMPRESSO_DATA")
    for name in ("stories260K", "babyllama-tok361"):
        folder = Path(root or "", "models", name)
        if root and folder.is_dir():
            found[name] = Case(folder, str(Path(root, STORIES)), "")
        else:
            print(f"{name} is left out: COMPRESSO_DATA names no folder that holds it")
    return found


def recipe_of(method: str, configuration: str, keep: float, updates: int | None) -> dict[str, Any]:
    """A method's recipe; with `updates`, those of all its training stages together, so that learning gates is not
    extra.
    """
    raw = with_knob(read(method + configuration), "keep", keep)
    if updates is None:
        return raw
    knobs = {name: values for stage in raw["stages"] for name, values in stage.items()}
    learning = sum(knobs.get("learn_gates", {}).get(phase, 0) for phase in ("tune", "ramp", "hold"))
    return override(raw, "stages.recover.steps", updates - learning)


def report_of(case: Case, keep: float, updates: int | None, seed: int) -> Report:
    """Prune a model by every method, and merge the reports of the runs: the dense model first."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for method in METHODS:
            raw = recipe_of(method, case.configuration, keep, updates)
            folders.append(
                run(raw, case.model, case.data, output=Path(scratch, method), seed=seed, allow_collapsed=True).folder
            )
        return read_results(folders).report()


def row(results: ModelResults) -> list[str]:
    """One model's cells; a number that it cannot have, such as a distance from itself, is a dash."""
    cells = []
    for name, _, form in COLUMNS:
        value = results.value(name)
        cells.append("-" if value is None else form.format(value / 1e6 if name == "bytes/disk" else value))
    return cells


def table(reports: dict[str, Report]) -> str:
    """Markdown, one block of rows a model."""
    lines = [
        "| model | method | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for model, report in reports.items():
        lines += [f"| {model} | {results.name} | " + " | ".join(row(results)) + " |" for results in report.models]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for, then write the table of everything that was ever run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--updates", type=int, default=300, help="of all training stages of a run together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = cases()
    for name in [] if given.only_table else given.models or known:
        path = report_path(RESULTS / f"models_{name}.json")
        write_report_file(path, report_of(known[name], given.keep, given.updates, given.seed))
        print(f"{name}: {path.name}")
    files = {path.stem.removeprefix("models_"): path for path in sorted(RESULTS.glob("models_*.json"))}
    reports = {name: Report.model_validate_json(path.read_text("utf-8")) for name, path in files.items()}
    (RESULTS / "models.md").write_text(table(reports), "utf-8")
    print(table(reports))


if __name__ == "__main__":
    main()
