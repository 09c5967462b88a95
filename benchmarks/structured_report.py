"""What the structured comparison found: tables in Markdown, and one page with plots, without script or network.

    python benchmarks/structured_report.py [--no-speed]

Reads results/structured.jsonl and, of structured_memory.py, structured_memory.json. Decode speed is measured here, on
this machine: every method's shapes of seed 0 (the weights do not matter) in turn with the dense model, in float32 on
one thread, beside what reading fewer bytes allows. Writes structured.md, structured.html and structured_speed.json, and
what the catalogue shows into the package.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

import compresso
from common import RESULTS, machine, write
from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.metrics.latency import speed_measurements
from compresso.report.charts import curves
from compresso.runner.recipe import read
from structured import WHOLE, rows_of
from structured_cases import DENSE, METHODS, cases

QUALITY = {
    "nano": (
        ("accuracy", "accuracy of nine tasks", ".3f", False),
        ("perplexity", "perplexity of fresh documents", ".2f", True),
    ),
    "babyllama-tok361": (
        ("unseen_loss", "loss on unseen stories, nats", ".3f", True),
        ("held_loss", "loss on held-out windows, nats", ".3f", True),
    ),
}
"""Of each model the numbers that are shown: name, title, form, and whether lower is better."""
Rows = Sequence[Mapping[str, Any]]
Speeds = Mapping[str, Mapping[str, Mapping[str, float]]]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, from two seeds on, standard deviation."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def cell(rows: Rows, number: str, form: str) -> str:
    """After recovery, and in brackets straight after pruning."""
    if not rows:
        return "-"
    after = spread([row["after"][number] for row in rows], form)
    before = [row["before"][number] for row in rows if "before" in row]
    return f"{after} ({format(statistics.mean(before), form)})" if before else after


def tables(rows: Rows, speed: Speeds, measured: Speeds) -> dict[str, list[list[str]]]:
    """Model and number -> header and rows."""
    made: dict[str, list[list[str]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        keeps = sorted({row["keep"] for row in mine if row["method"] != DENSE}, reverse=True)
        names = [name for name in METHODS if any(row["method"] == name for row in mine)]
        for number, title, form, _ in QUALITY[model]:
            lines = [["method", *(f"{keep:.0%} of the blocks" for keep in keeps)]]
            lines += [[DENSE, *(cell([row for row in mine if row["method"] == DENSE], number, form) for _ in keeps)]]
            lines += [
                [
                    name,
                    *(
                        cell([row for row in mine if row["method"] == name and row["keep"] == keep], number, form)
                        for keep in keeps
                    ),
                ]
                for name in names
            ]
            made[f"{model}: {title}"] = lines
        lines = [["method", *(f"{keep:.0%}: blocks kept, MiB, s, decode x (bound)" for keep in keeps)]]
        for name in names:
            row = [name]
            for keep in keeps:
                found = [one for one in mine if one["method"] == name and one["keep"] == keep]
                on_gpu = [one for one in found if "peak_mib" in one]
                fast = speed.get(model, {}).get(f"{name} {keep}")
                parts = [
                    format(statistics.mean(one["kept_blocks"] for one in found), ".4f") if found else "-",
                    format(statistics.mean(one["peak_mib"] for one in on_gpu), ".0f") if on_gpu else "-",
                    format(statistics.mean(sum(one["stage_seconds"]) for one in on_gpu), ".0f") if on_gpu else "-",
                    f"{fast['speedup']:.2f} ({fast['bound']:.2f})" if fast else "-",
                ]
                row.append(", ".join(parts))
            lines.append(row)
        made[f"{model}: cost on a GPU"] = lines
        if model in measured:
            costs = [[name, f"{one['mib']:.0f}", f"{one['seconds']:.1f}"] for name, one in measured[model].items()]
            made[f"{model}: 20 updates at 70%, one CPU thread"] = [
                ["method", "MiB over the loaded model", "CPU seconds"],
                *costs,
            ]
    return made


def speeds(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> method and share -> measured decode speed-up over dense, and its bound."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in cases().items():
        source = open_source(str(case.model))

        def fresh(source: Any = source) -> Any:
            return as_stock(load_model(source, dtype=torch.float32, device=torch.device("cpu")))

        for keep in sorted({row["keep"] for row in rows if row["method"] != DENSE}):
            models = {DENSE: fresh()}
            for row in rows:
                if (row["model"], row["keep"], row["seed"]) == (name, keep, 0) and "kept" in row:
                    model = fresh()
                    plan = Plan(
                        {
                            axis: tuple(left) if axis in WHOLE else tuple(range(left))
                            for axis, left in row["kept"].items()
                        }
                    )
                    shrink_(model, arch_for(model.config).axes(model), plan)
                    models[f"{row['method']} {keep}"] = model
            if len(models) > 1:
                for label, numbers in speed_measurements(models, (1,), 64, 32, 5).items():
                    values = {one.name: one.value for one in numbers}
                    if label != DENSE:
                        pair = {"speedup": values["decode_speedup/batch1"], "bound": values["decode_bound/batch1"]}
                        found.setdefault(name, {})[label] = {key: round(value, 3) for key, value in pair.items()}
    return found


def markdown(made: Mapping[str, list[list[str]]]) -> str:
    """All tables, one after another."""
    parts: list[str] = []
    for title, (header, *lines) in made.items():
        parts += [f"### {title}", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        parts += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join(parts)


def plots(rows: Rows) -> list[tuple[str, Markup]]:
    """For each model a plot of quality against what was removed: after recovery, and straight after pruning."""
    drawn: list[tuple[str, Markup]] = []
    for model, numbers in QUALITY.items():
        mine = [row for row in rows if row["model"] == model]
        number, title, _, _ = numbers[0]
        dense = [row["after"][number] for row in mine if row["method"] == DENSE]
        for when in ("after", "before") if dense else ():
            ends = {name: [row for row in mine if row["method"] == name and when in row] for name in METHODS}
            for chunk, families in FAMILIES.items():
                lines = {
                    name: (
                        [(0.0, dense[0])]
                        + [
                            (
                                100 * (1 - keep),
                                statistics.mean(row[when][number] for row in ends[name] if row["keep"] == keep),
                            )
                            for keep in sorted({row["keep"] for row in ends[name]}, reverse=True)
                        ]
                    )
                    for name in families
                    if ends.get(name)
                }
                label = (
                    f"{model}: {title}, {'after recovery' if when == 'after' else 'straight after pruning'}; {chunk}"
                )
                if lines:
                    drawn.append(
                        (
                            label,
                            curves(lines, label + ", over % of block parameters removed", axis="% of blocks removed"),
                        )
                    )
    return drawn


FAMILIES = {
    "one pass": ("random", "magnitude", "gate-Taylor", "LLM-Pruner element^1", "LLM-Pruner vector", "contextual"),
    "learned": ("gate-Taylor", "Compresso", "LoRAPrune", "LoRAShear"),
    "depth and width": ("gate-Taylor", "ShortGPT", "Minitron depth", "Minitron width"),
    "labels or the dense model": (
        "gate-Taylor",
        "gate-Taylor, KD",
        "Compresso",
        "Compresso, KD",
        "Minitron width",
        "Minitron width, KD",
    ),
}
"""Methods that share a plot."""
STYLE = """:root{--ink:#1b1f24;--muted:#5b6570;--line:#d8dde3;--accent:#2f6fde;--paper:#fff;--s0:#2f6fde;--s1:#d1495b;
--s2:#2a9d8f;--s3:#8e5bd0;--s4:#c77d0a;--s5:#4d7c0f;--s6:#0e7490;--s7:#9f1239;--warn:#b45309}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--muted:#9aa4ae;--line:#333b44;--paper:#14181c;--s0:#7aa7ff;--s1:#ff8b98;--s2:#5fd3c4;--s3:#c4a1ff;
--s4:#f0b35a;--s5:#a3d65c;--s6:#67d5ea;--s7:#ff8fb0}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
  max-width:72rem;margin:2rem auto;padding:0 1rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:1rem}
figure{margin:0}figcaption{font-size:13px;color:var(--muted)}
table{border-collapse:collapse;font-size:13px;margin:.5rem 0 1.5rem}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}"""


def page(rows: Rows, made: Mapping[str, list[list[str]]]) -> str:
    """One HTML page that needs nothing else."""
    keeps = sorted({row["keep"] for row in rows if row["method"] != DENSE}, reverse=True)
    seeds = {
        keep: sorted({row["seed"] for row in rows if row["keep"] == keep and row["method"] != DENSE}) for keep in keeps
    }
    named = {keep: ", ".join(map(str, found)) for keep, found in seeds.items()}
    same = len(set(named.values())) == 1
    told = named[keeps[0]] if same else "; ".join(f"{found} at {keep:.0%}" for keep, found in named.items())
    updates = sorted({row["updates"] for row in rows})
    intro = (
        "Every method at the same share of block parameters, with the same data, the same LoRA recovery and"
        f" {updates[0]} updates in all (what a method learns with is part of them). Seeds {told}; mean ± standard"
        " deviation where there are two or more; in brackets the value straight after pruning. ShortGPT drops whole"
        " layers and never keeps more than the share: see the blocks it kept. On models this small a token costs"
        " Python, not memory: only removed layers speed up decoding."
    )
    body = [
        Markup("<h1>Structured pruning, compared fairly</h1><p>{}</p>").format(intro),
        Markup('<div class="plots">'),
    ]
    body += [Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(svg, label) for label, svg in plots(rows)]
    body.append(Markup("</div>"))
    for title, (header, *lines) in made.items():
        head = Markup("").join(Markup("<th>{}</th>").format(one) for one in header)
        cells = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(one) for one in line))
            for line in lines
        )
        body.append(
            Markup('<h2>{}</h2><div class="wide"><table><tr>{}</tr>{}</table></div>').format(title, head, cells)
        )
    opening = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        opening
        + "<title>Structured pruning</title>"
        + f"<style>{STYLE}</style><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def catalogue(rows: Rows) -> dict[str, Any]:
    """What `compresso methods NAME` shows of it: the first number of each model, by the stage that removes."""
    found: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        for model, numbers in QUALITY.items():
            number, title, form, _ = numbers[0]
            mine = [row for row in rows if row["model"] == model and row["method"] == name]
            if mine:
                stage = next(iter(read(method.recipe)["stages"][0]))
                dense = [row for row in rows if row["model"] == model and row["method"] == DENSE]
                keeps = sorted({row["keep"] for row in mine}, reverse=True)
                kept = {
                    f"{keep:.0%}": cell([row for row in mine if row["keep"] == keep], number, form) for keep in keeps
                }
                found.append(
                    {
                        "stage": stage,
                        "method": name,
                        "model": model,
                        "what": title,
                        "dense": cell(dense, number, form),
                        "kept": kept,
                    }
                )
    updates, seeds = sorted({row["updates"] for row in rows}), sorted({row["seed"] for row in rows})
    how = (
        f"benchmarks/structured.py: {updates[0]} updates in all, seeds {', '.join(map(str, seeds))}; in brackets before"
        " recovery"
    )
    return {"how": how, "rows": found}


def main() -> None:
    """Write table and page of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-speed", action="store_true", help="take the speeds that were measured before")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of()
    kept = RESULTS / "structured_speed.json"
    if given.no_speed:
        speed = json.loads(kept.read_text("utf-8"))["speed"] if kept.exists() else {}
    else:
        speed = speeds(rows)
        write(
            "structured_speed",
            {"what": "decode speed-up over dense, batch 1, float32, one thread", "speed": speed, "machine": machine()},
        )
    memory = RESULTS / "structured_memory.json"
    made = tables(rows, speed, json.loads(memory.read_text("utf-8"))["cost"] if memory.exists() else {})
    (RESULTS / "structured.md").write_text(markdown(made), "utf-8")
    (RESULTS / "structured.html").write_text(page(rows, made), "utf-8")
    package = Path(compresso.__file__).parent / "commands" / "measured.json"
    package.write_text(json.dumps(catalogue(rows), indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(markdown(made))


if __name__ == "__main__":
    main()
