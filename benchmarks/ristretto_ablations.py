"""Ristretto with one part taken away or changed at a time, without training: what each part is worth.

    COMPRESSO_DATA=folder python benchmarks/ristretto_ablations.py --scratch FOLDER [--models nano SMOLLM2_FOLDER ...]
        [--only search depth ...] [--ratios 0.2 0.5] [--seeds 0] [--windows 16] [--tokens 24576] [--threads 1]
    python benchmarks/ristretto_ablations.py --report

Data, scores and windows are those of `flagship.py`, and so is the whole method, whose rows are made here once more, so
that both sides of a comparison come from one run. A finished row is a line of results/ristretto_ablations.jsonl and is
not done again. A part pays where the method without it is farther from dense in KL, over windows in pairs; the column
says by how much, with a 95 % interval over windows and seeds. A part whose interval lies below zero hurts.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, high_water_mib, machine
from flagship import Judged
from flagship_report import farther
from kept import stored
from repair import SELECTORS, cells

LINES = RESULTS / "ristretto_ablations.jsonl"
KEYS = ("model", "without", "ratio", "repair", "seed", "tokens", "windows")
WHOLE = "nothing"
WIDTHS = ["head", "query", "channel"]
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    WHOLE: ({}, "the whole method"),
    "search": ({"search": "none"}, "one share in every layer"),
    "evolution": ({"search": "dp"}, "the best beginning by the bank's errors"),
    "depth": ({"kinds": WIDTHS}, "no attention, FFN or layer leaves as a whole"),
    "single query heads": ({"kinds": ["attention", "mlp", "head", "channel"]}, "key/value heads leave with theirs"),
    "attention": ({"kinds": ["mlp", "channel"]}, "FFNs alone give"),
    "several beginnings": ({"beginnings": 1}, "no layer gone at the start"),
    "a judgement of finalists": ({"finalists": 0}, "the evolution's best is taken or the best beginning"),
    "judging as found": ({"judged": "repaired"}, "candidates are repaired before they are judged"),
    "damping of .1": ({"damping": 0.01}, "a tenth of it"),
}
"""What is taken away: knobs of the stage, and the method that is left."""


def run(given: argparse.Namespace) -> None:
    """Do what is missing."""
    torch.set_num_threads(given.threads)
    where = {key: value for key, value in machine().items() if key != "load_before"}
    stage, knobs = SELECTORS["ristretto/found"]
    for name in given.models:
        subject: Judged | None = None
        shown = name if name in ("nano", "babyllama") else Path(name).name
        for seed in given.seeds:
            for ratio in given.ratios:
                for without in given.only:
                    cell = {"model": shown, "without": without, "ratio": ratio, "seed": seed}
                    cell |= {"tokens": given.tokens, "windows": given.windows}
                    known = {tuple(row[key] for key in KEYS) for row in stored(LINES)}
                    repairs = ["none", "residual"]
                    left = [one for one in repairs if tuple({**cell, "repair": one}[key] for key in KEYS) not in known]
                    if not left:
                        continue
                    subject = subject or Judged(name, given.tokens, given.windows)
                    SELECTORS["changed"] = (stage, {**knobs, **CHANGED[without][0]})
                    scratch = given.scratch / f"{shown}-{without.replace(' ', '-')}-{ratio}-{seed}-{given.tokens}"
                    for row in cells(subject, "changed", ratio, left, seed, scratch):
                        line = {**cell, **row, "peak_mib": round(high_water_mib()), "machine": where}
                        with LINES.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                        print(json.dumps({key: line[key] for key in line if key != "machine"}), flush=True)


def report() -> None:
    """Write results/ristretto_ablations.md."""
    done = stored(LINES)
    text = [
        "# Ristretto, one part less at a time",
        "",
        "KL from the dense model in nats a token without training, with `repair: residual` behind it where that lowers"
        " the held-out loss. Farther: how much more than the whole method, in pairs of windows, with a 95 % interval."
        " See `benchmarks/ristretto_ablations.py`.",
    ]
    for model in dict.fromkeys(row["model"] for row in done):
        mine = [row for row in done if row["model"] == model]
        one = mine[0]
        text += ["", f"## {model}", ""]
        text += [f"{one['tokens']:,} tokens of calibration; {one['machine']['processor']}."]
        for ratio in sorted({row["ratio"] for row in mine}):
            text += ["", f"### {ratio:.0%} of the block parameters removed".replace("%", " %"), ""]
            text += _table([row for row in mine if row["ratio"] == ratio])
    (RESULTS / "ristretto_ablations.md").write_text("\n".join([*text, ""]), "utf-8")


def _table(mine: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| without | what is left | KL found | KL repaired | farther | minutes | seeds |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in mine:
        found.setdefault(row["without"], {}).setdefault(row["repair"], {})[row["seed"]] = row
    whole = found.get(WHOLE, {}).get("residual", {})
    for without, by in sorted(found.items(), key=lambda item: _mean(item[1].get("residual", item[1]["none"]))):
        last = by.get("residual", by["none"])
        minutes = statistics.fmean(sum(row["seconds"].values()) for row in last.values()) / 60
        lines.append(
            f"| {without} | {CHANGED[without][1]} | {_mean(by['none']):.3f} | {_mean(last):.3f} |"
            f" {_farther(whole, last) if without != WHOLE else ''} | {minutes:.1f} | {len(last)} |"
        )
    return lines


def _mean(of: Mapping[int, Mapping[str, Any]]) -> float:
    return statistics.fmean(row["kl"] for row in of.values())


def _farther(whole: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> str:
    """Mean difference in pairs of windows, with its 95 % interval."""
    gaps = farther(whole, other)
    if len(gaps) < 2:
        return "no pair"
    return f"{statistics.fmean(gaps):+.3f} ± {1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f}"


def main() -> None:
    """Run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano"])
    parser.add_argument("--only", nargs="+", default=list(CHANGED), choices=list(CHANGED), help="what to take away")
    parser.add_argument("--scratch", type=Path, default=Path("ristretto_ablations"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    given = parser.parse_args()
    if not given.report:
        run(given)
    report()


if __name__ == "__main__":
    main()
