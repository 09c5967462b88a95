"""What is best at a size without training: every selector, with and without repair, and ristretto, on three seeds.

    COMPRESSO_DATA=folder python benchmarks/flagship.py --updates 0 [--models nano SMOLLM2_FOLDER]
        [--ratios 0.2 0.3 0.5] [--selectors ...] [--repairs none residual] [--seeds 0 1 2] [--windows 20]
        [--tokens 16384] [--threads 1]
    python benchmarks/flagship.py --report

Calibration is a mixture (papers, encyclopaedia, instructions, stories; the embedded model: its own documents) of which
nothing is scored; a seed draws other rows of it for what is drawn. Scores are those of `repair.py`: KL from the dense
model in nats a token, and perplexity of texts that nobody calibrated on. A finished row is a line of
results/flagship.jsonl and is not done again. With updates, every row would be trained alike before it is scored; only 0
is there yet.

The report says for each ratio which method is nearest to dense by KL, and by how much the next is farther, pairing
seeds: won is more than 6 %, with every seed on the same side.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, high_water_mib, machine
from repair import SELECTORS, Subject, cells

LINES = RESULTS / "flagship.jsonl"
KEYS = ("model", "selector", "ratio", "repair", "seed", "tokens", "windows")
MARGIN = 1.06


def rows() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in LINES.read_text("utf-8").splitlines()] if LINES.exists() else []


def run(given: argparse.Namespace) -> None:
    """Do what is missing, seeds last, so that a table that is cut short has all methods."""
    torch.set_num_threads(given.threads)
    where = {key: value for key, value in machine().items() if key != "load_before"}
    for name in given.models:
        subject: Subject | None = None
        shown = name if name in ("nano", "babyllama") else Path(name).name
        for seed, ratio, selector in _order(given):
            cell = {"model": shown, "selector": selector, "ratio": ratio, "seed": seed}
            cell |= {"tokens": given.tokens, "windows": given.windows}
            known = {tuple(row[key] for key in KEYS) for row in rows()}
            wanted = ["none"] if selector == "dense" else given.repairs
            left = [one for one in wanted if tuple({**cell, "repair": one}[key] for key in KEYS) not in known]
            if not left:
                continue
            subject = subject or Subject(name, given.tokens, given.windows, "mixed")
            for row in _scored(subject, selector, ratio, left, seed):
                line = {**cell, **row, "peak_mib": round(high_water_mib()), "machine": where}
                with LINES.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps({key: line[key] for key in line if key != "machine"}), flush=True)


def _order(given: argparse.Namespace) -> Iterator[tuple[int, float, str]]:
    yield given.seeds[0], 0.0, "dense"
    for seed in given.seeds:
        for ratio in given.ratios:
            for selector in given.selectors:
                yield seed, ratio, selector


def _scored(
    subject: Subject, selector: str, ratio: float, repairs: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """A selector's rows; one that fails has its reason in the place of scores."""
    begun = time.monotonic()
    if selector == "dense":
        yield {"repair": "none", **subject.scores(subject.job(Path("unused"), seed))}
        return
    try:
        yield from cells(subject, selector, ratio, repairs, seed)
    except Exception as error:  # a table names what cannot be done and goes on
        for repair in repairs:
            yield {"repair": repair, "failed": str(error)[:200], "seconds": round(time.monotonic() - begun, 1)}


def report() -> None:
    """Write results/flagship.md."""
    done = rows()
    text = [
        "# Without training",
        "",
        "KL from the dense model in nats a token, and perplexities; mean over seeds, ± half the range. See"
        " `benchmarks/flagship.py`.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in done):
        mine = [row for row in done if row["model"] == model]
        texts = [key for key in ("wikitext2", "c4", "stories", "world") if any(key in row for row in mine)]
        one = mine[0]
        where = one["machine"]["cuda"] or one["machine"]["processor"]
        text += [
            f"## {model}",
            "",
            f"{one['tokens']:,} tokens of calibration, {one['windows']} windows a text; {where}.",
        ]
        for ratio in sorted({row["ratio"] for row in mine if row["ratio"]}):
            text += ["", f"### {ratio:.0%} of the block parameters removed".replace("%", " %"), ""]
            text += _table([row for row in mine if row["ratio"] in (ratio, 0.0)], texts)
            text += ["", _verdict([row for row in mine if row["ratio"] == ratio and "kl" in row])]
        text.append("")
    (RESULTS / "flagship.md").write_text("\n".join(text), "utf-8")


def _table(mine: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[str]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in mine:
        found.setdefault((row["selector"], row["repair"]), []).append(row)

    def far(of: Sequence[Mapping[str, Any]]) -> float:
        return statistics.fmean(row.get("kl", float("inf")) for row in of)

    lines = [
        "| method | repair | KL | " + " | ".join(texts) + " | kept | seeds |",
        "|---|---|" + "---:|" * (len(texts) + 3),
    ]
    for (selector, repair), of in sorted(found.items(), key=lambda item: far(item[1])):
        scored = [row for row in of if "kl" in row]
        if not scored:
            lines.append(f"| {selector} | {repair} | {of[0]['failed']} |" + " |" * (len(texts) + 2))
            continue
        numbers = [_spread([row[key] for row in scored]) for key in ("kl", *texts)]
        kept = statistics.fmean(row.get("kept_share_of_blocks", 1.0) for row in scored)
        lines.append(f"| {selector} | {repair} | {' | '.join(numbers)} | {kept:.3f} | {len(scored)} |")
    return lines


def _verdict(mine: Sequence[Mapping[str, Any]]) -> str:
    """Which method is nearest, and whether it has won."""
    by_method: dict[str, dict[int, float]] = {}
    for row in mine:  # of each method the better of its repairs
        best = by_method.setdefault(row["selector"], {})
        best[row["seed"]] = min(best.get(row["seed"], float("inf")), row["kl"])
    ranked = sorted(by_method, key=lambda method: statistics.fmean(by_method[method].values()))
    if len(ranked) < 2:
        return "One method alone."
    first, second = (by_method[method] for method in ranked[:2])
    ratios = [second[seed] / first[seed] for seed in sorted(first.keys() & second.keys())]
    if not ratios:
        return f"{ranked[0]} is nearest, {ranked[1]} next; they share no seed."
    won = all(ratio > 1 for ratio in ratios) and statistics.fmean(ratios) > MARGIN and len(ratios) > 1
    told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"{ranked[0]} is nearest; {ranked[1]} is {told} times as far{' (won)' if won else ''}."


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 3 if mean < 10 else 1
    half = (max(values) - min(values)) / 2
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    """Run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=0, choices=[0])
    parser.add_argument("--models", nargs="+", default=["nano"])
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--repairs", nargs="+", default=["none", "residual"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    if not given.report:
        run(given)
    report()


if __name__ == "__main__":
    main()
