"""What the first real model found: tables in Markdown and one page with plots, without script or network.

    python benchmarks/real_model_report.py

Reads results/real_model.jsonl, which `real_model.py` appends to, and writes real_model.md and real_model.html beside
it, and the short table in README.md. What was not done is named below its table; how the runs were shortened stands
above them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from common import RESULTS
from compresso.report.charts import curves
from real_model import BATCH, CALIBRATION, LENGTH, LINES, TASKS, cells

README = RESULTS.parents[1] / "README.md"
Found = Mapping[tuple[str, str], Mapping[str, Any]]
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4 sample"}
HEADINGS = {
    "dense": "The dense model",
    "sparse": "Weights set to zero, no training",
    "rounded": "Weights rounded, no training",
    "structured": "Units and layers removed, then the same number of updates for each",
}
STYLE = """:root{--ink:#1b1f24;--muted:#5b6570;--line:#d8dde3;--paper:#fff;--s0:#2f6fde;--s1:#d1495b;--s2:#2a9d8f;
--s3:#8e5bd0;--s4:#c77d0a;--s5:#4d7c0f;--s6:#0e7490;--s7:#9f1239;--s8:#57534e;--s9:#be185d}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--muted:#9aa4ae;--line:#333b44;--paper:#14181c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:72rem;margin:2rem auto;
padding:0 1rem}figure{margin:0 0 1.5rem}figcaption{font-size:13px;color:var(--muted)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;margin:.5rem 0 1.5rem}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}"""


def found() -> Found:
    """The lines by cell and part; a later one replaces an earlier one."""
    lines = [json.loads(line) for line in LINES.read_text("utf-8").splitlines()]
    return {(one["cell"], one["part"]): one for one in lines}


def perplexity(lines: Found, cell: str, text: str) -> str:
    """Perplexity and its standard error over windows."""
    if (cell, "perplexity") not in lines:
        return "-"
    one = lines[cell, "perplexity"]["found"][text]
    return f"{_short(one['value'])} ± {_short(one['value'] * one['stderr'])}"


def score(lines: Found, cell: str, task: str) -> str:
    """Accuracy and its standard error over items."""
    found_scores = lines.get((cell, "tasks"), {}).get("found", {})
    name = next((one for one in (f"{task}/acc", task) if one in found_scores), None)
    if name is None:
        return "-"
    return f"{found_scores[name]['value']:.2f} ± {found_scores[name]['stderr']:.2f}"


def parameters(lines: Found, cell: str) -> str:
    """Parameters of the blocks that stayed, in per cent; all zeros are still stored."""
    facts = lines.get((cell, "perplexity"), {}).get("facts", {})
    if "after" not in facts:
        return "-"
    kept, of = (facts[when]["parameters"]["blocks"] for when in ("after", "before"))
    return f"{100 * kept / of:.1f} %"


def table(lines: Found, kind: str, updates: int) -> list[str]:
    """The rows of one kind in Markdown, and what is not done yet."""
    columns = ["method", "", "blocks", *TEXTS.values(), *TASKS]
    rows = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    missing: list[str] = []
    for cell in cells(updates):
        if cell.kind in (kind, "dense"):
            if not {(cell.name, "perplexity"), (cell.name, "tasks")} & lines.keys():
                missing.append(f"{cell.method} {cell.setting}".strip())
                continue
            numbers = [perplexity(lines, cell.name, text) for text in TEXTS]
            numbers += [score(lines, cell.name, task) for task in TASKS]
            kept = parameters(lines, cell.name)
            rows.append(f"| {' | '.join([cell.method, cell.setting, kept, *numbers])} |")
    return [*rows, *(["", f"Not done yet: {'; '.join(missing)}."] if missing else [])]


def how(lines: Found) -> str:
    """How the runs were shortened, and where they ran."""
    some = next(iter(lines.values()))
    dense = lines["dense", "perplexity"]["found"]["wikitext2"]
    updates = max(one["updates"] for one in lines.values())
    items = max((found_score["n"] for one in lines.values() if one["part"] == "tasks"
                 for found_score in one["found"].values() if found_score["n"]), default=0)  # fmt: skip
    machine = some["machine"]
    where = machine["cuda"] or f"{machine['processor']}, {machine['threads']} thread(s)"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"SmolLM2-135M-Instruct (from a GGUF of 4 bits: numbers are relative to this dense model), one seed, shortened"
        f" for a CPU. Calibration: {CALIBRATION['examples']} windows of {CALIBRATION['length']} tokens. Structured:"
        f" {updates} updates of {BATCH * LENGTH:,} tokens for each method. Perplexity: {dense['tokens']:,} tokens in"
        f" windows of 512. Tasks: the first {items} items of each, zero-shot, lm_eval. ± is one standard error."
        f" Measured on {where}; {versions}."
    )


def plots(lines: Found, updates: int) -> list[Markup]:
    """Perplexity of each text over what was removed, one line a method; its logarithm, for it spans decades."""
    drawn: list[Markup] = []
    for kind in ("structured", "sparse"):
        for text, title in TEXTS.items():
            by_method: dict[str, list[tuple[float, float]]] = {}
            for cell in cells(updates):
                if cell.kind == kind and (cell.name, "perplexity") in lines:
                    loss = lines[cell.name, "perplexity"]["found"][text]["loss"]
                    by_method.setdefault(cell.method, []).append((float(cell.setting.split()[0]), loss))
            dense = lines["dense", "perplexity"]["found"][text]["loss"]
            several = {method: [(0.0, dense), *points] for method, points in by_method.items()}
            if several:
                what = f"{title}: log perplexity, {HEADINGS[kind].lower()}"
                drawn.append(Markup('<figure class="wide">{}<figcaption>{}</figcaption></figure>').format(
                    curves(several, what, axis="% removed"), what))  # fmt: skip
    return drawn


def short(lines: Found, updates: int) -> list[str]:
    """Perplexity alone, methods by what was removed, for README.md."""
    by_kind: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells(updates):
        if (cell.name, "perplexity") in lines and cell.kind != "dense":
            method, _, bits = cell.method.partition(", ")
            values = [lines[cell.name, "perplexity"]["found"][text]["value"] for text in TEXTS]
            by_kind.setdefault(cell.kind, {}).setdefault(method, {})[bits or cell.setting] = " / ".join(
                map(_short, values)
            )
    dense = " / ".join(_short(lines["dense", "perplexity"]["found"][text]["value"]) for text in TEXTS)
    text = [f"Perplexity of {' / '.join(TEXTS.values())}; dense {dense}.", ""]
    for kind, methods in by_kind.items():
        settings = list(dict.fromkeys(setting for of in methods.values() for setting in of))
        text += [f"| {HEADINGS[kind].lower()} | {' | '.join(settings)} |", "|---|" + "---:|" * len(settings)]
        text += [f"| {method} | {' | '.join(of.get(one, '-') for one in settings)} |" for method, of in methods.items()]
        text.append("")
    return text


def main() -> None:
    """Write the tables and the page."""
    lines = found()
    updates = max(one["updates"] for one in lines.values())
    text = [how(lines), ""]
    for kind in ("sparse", "rounded", "structured"):
        text += [f"### {HEADINGS[kind]}", "", *table(lines, kind, updates), ""]
    (RESULTS / "real_model.md").write_text("\n".join(text), "utf-8")
    before, mark, rest = README.read_text("utf-8").partition("<!-- real model -->")
    after = rest.partition("<!-- /real model -->")[2]
    part = "\n".join([how(lines), "", *short(lines, updates)])
    README.write_text(f"{before}{mark}\n{part}<!-- /real model -->{after}", "utf-8")
    body = [Markup("<p>{}</p>").format(how(lines)), *plots(lines, updates)]
    for kind in ("sparse", "rounded", "structured"):
        body.append(Markup("<h2>{}</h2>{}").format(HEADINGS[kind], html_table(table(lines, kind, updates))))
    (RESULTS / "real_model.html").write_text(page("SmolLM2-135M, compressed", body), "utf-8")


def page(title: str, body: Sequence[Markup]) -> str:
    """A page of results."""
    whole = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>{}</title>'
        '<meta name="viewport" content="width=device-width"><style>{}</style><body><h1>{}</h1>{}'
    ).format(title, Markup(STYLE), title, Markup("").join(body))
    return f"{whole}\n"


def html_table(rows: Sequence[str]) -> Markup:
    """A table in Markdown, and the lines behind it, for a page."""
    cells_of = [[part.strip() for part in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    after = [row for row in rows if row and not row.startswith("|")]
    head = Markup("").join(Markup("<th>{}</th>").format(one) for one in cells_of[0])
    lines = [Markup("").join(Markup("<td>{}</td>").format(one) for one in row) for row in cells_of[2:]]
    body = Markup("").join(Markup("<tr>{}</tr>").format(line) for line in lines)
    told = Markup("").join(Markup("<p>{}</p>").format(row) for row in after)
    return Markup('<div class="wide"><table><tr>{}</tr>{}</table></div>{}').format(head, body, told)


def _short(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
