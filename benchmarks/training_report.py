"""The table of `training.py`: training.jsonl -> training.json and training.md beside it."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LINES = "training.jsonl"
Line = dict[str, Any]
AIMS = """Aims on a GPU: a LoRA step puts 40 % of the matrix rate to use at 7B, recomputing takes at most 1.5 times as
long, and a mask step 1.05 times a LoRA step; on a CPU 1.03 times."""


def report(lines: Path) -> str:
    """Write the newest run of each device as training.json and training.md, and return the page."""
    found = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    runs: dict[str, dict[str, Any]] = {}
    for device in ("cuda", "cpu"):
        heads = [line for line in found if line["device"] == device and "machine" in line]
        if heads:
            head = heads[-1]
            own = [line for line in found if line["run"] == head["run"] and line["device"] == device and "kind" in line]
            runs[device] = summary(head, own)
    lines.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n", "utf-8")
    text = page(runs)
    lines.with_suffix(".md").write_text(text, "utf-8")
    return text


def summary(head: Line, lines: Sequence[Line]) -> dict[str, Any]:
    """One row for each variant of each group, and the ratios between them."""
    rate = float(head["matrix"]["flops"])
    keys = list(dict.fromkeys(_key(line) for line in lines))
    rows: list[dict[str, Any]] = []
    for key in keys:
        own = [line for line in lines if _key(line) == key]
        seconds = statistics.median(line["step_s"] for line in own)
        tokens = own[0]["rows"] * own[0]["length"]
        peaks = [line["peak_gib"] for line in own if line["peak_gib"] is not None]
        rows.append(
            {
                **{name: own[0][name] for name in ("shape", "rows", "length", "kind", "recompute", "switch")},
                "step_ms": round(seconds * 1000, 1),
                "step_ms_range": [round(pick(line["step_s"] for line in own) * 1000, 1) for pick in (min, max)],
                "tokens_s": round(tokens / seconds, 1),
                "share": round(own[0]["owed_flops"] / seconds / rate, 4),
                "peak_gib": round(max(peaks), 2) if peaks else None,
                "timings": len(own),
            }
        )
    facts = {name: head[name] for name in ("machine", "matrix", "command", "trial", "run")}
    return {**facts, "rows": rows, "ratios": _ratios(lines)}


def _key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("shape", "rows", "length", "group", "kind", "recompute", "switch"))


COMPARED: list[tuple[str, Callable[[Line], bool], Callable[[Line], dict[str, Any]]]] = [
    ("mask / LoRA", lambda one: one["kind"] == "mask", lambda one: {"kind": "LoRA"}),
    ("recomputed / kept", lambda one: one["recompute"], lambda one: {"recompute": False}),
    ("torch's norms / eager", lambda one: one["switch"] == "norms", lambda one: {"switch": ""}),
    ("compiled / eager", lambda one: one["switch"] == "compiled", lambda one: {"switch": ""}),
    (
        "fused loss / plain",
        lambda one: one["kind"] == "LoRA, fused loss",
        lambda one: {"kind": "LoRA, our loop"},
    ),
    (
        "distilled / LoRA, our loop",
        lambda one: one["kind"].startswith("distil"),
        lambda one: {"kind": "LoRA, our loop"},
    ),
]
"""What a ratio is called, the lines above it, and what the line below it differs in."""


def _ratios(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Medians over the rounds in which both were timed."""
    by_turn = {(*_key(line), line["turn"]): line["step_s"] for line in lines}
    found: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        for name, above, below in COMPARED:
            if above(line) and (under := by_turn.get((*_key(line | below(line)), line["turn"]))):
                what = (name, line["shape"], f"{line['rows']} x {line['length']}", _called(line))
                found.setdefault(what, []).append(line["step_s"] / under)
    return [
        {
            **dict(zip(("ratio", "shape", "batch", "of"), what, strict=True)),
            "median": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }
        for what, ratios in found.items()
    ]


def _called(line: Line) -> str:
    """A variant in words."""
    switch = {"": "", "norms": ", torch's norms", "compiled": ", compiled"}[line["switch"]]
    return f"{line['kind']}{switch}{', recomputed' if line['recompute'] else ''}"


def page(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown of all runs."""
    text = ["# Throughput of training steps", "", " ".join(AIMS.split()), ""]
    for device, run in runs.items():
        where, matrix = run["machine"], run["matrix"]
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers", "peft"))
        on = (
            where["cuda"] if device == "cuda" else f"{where['processor']}, {where['threads']} of {where['cores']} cores"
        )
        text += [
            f"## {on}",
            "",
            f"A product of two random {matrix['dtype']} matrices of {matrix['size']} x {matrix['size']}:"
            f" {matrix['flops'] / 1e12:.3g} TFLOP/s. {versions}; `{run['command']}`.",
            "",
            "| shape | batch | step | ms | tokens/s | share of the matrix rate | peak beside the models, GiB |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        text += [
            f"| {row['shape']} | {row['rows']} x {row['length']} | {_called(row)} | {row['step_ms']} |"
            f" {row['tokens_s']:,.0f} | {100 * row['share']:.1f} % | {row['peak_gib'] or '-'} |"
            for row in run["rows"]
        ]
        text += ["", "| ratio | shape | batch | of | median | range |", "|---|---|---|---|---:|---:|"]
        text += [
            f"| {row['ratio']} | {row['shape']} | {row['batch']} | {row['of']} | {row['median']:.3f}"
            f" | {row['range'][0]:.3f} to {row['range'][1]:.3f} |"
            for row in run["ratios"]
        ]
        text.append("")
    return "\n".join(text)
