"""The pages of results/context.jsonl, context.md and context.html beside it: tables and plots of all that is there."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from common import RESULTS
from compresso.core.counted import counted
from compresso.report.charts import curves

Rows = Sequence[Mapping[str, Any]]
COLOURS = (files("compresso.report") / "templates" / "report.css").read_text("utf-8").partition("* {")[0]
"""What the charts' lines and letters are named by, for light and dark screens."""
STYLE = COLOURS + (
    "body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}"
    "body{max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ccc}"
    "td:nth-child(2),th:nth-child(2){text-align:left}figure{margin:1rem 0}svg{max-width:100%;height:auto}"
)
TITLES = {
    "text": "Perplexity",
    "recall": "Facts early in the context, asked late",
    "speed": "Bytes of the cache, and decoding",
}


def report(rows: Rows) -> None:
    """Write both pages."""
    (RESULTS / "context.md").write_text(markdown(rows), "utf-8")
    (RESULTS / "context.html").write_text(str(page(rows)) + "\n", "utf-8")


def of(rows: Rows, part: str, model: str) -> list[Mapping[str, Any]]:
    """Lines of a part and model, dense first, then by share."""
    found = [row for row in rows if (row["part"], row["model"]) == (part, model)]
    return sorted(found, key=lambda row: (-row["share"], row["method"]))


def tables(rows: Rows, part: str, model: str) -> list[list[Mapping[str, Any]]]:
    """Lines of a part and model, apart where windows or items are of other lengths."""
    found = of(rows, part, model)
    lengths = dict.fromkeys(row.get("length") for row in found)
    return [[row for row in found if row.get("length") == length] for length in lengths]


def told(part: str, found: Rows) -> str:
    """What a table shows, in a paragraph."""
    one, last = found[0], found[-1]["machine"]
    by = " and ".join(dict.fromkeys(row["machine"].get("cuda") or row["machine"]["processor"] for row in found))
    where = f"{by}, {last['threads']} thread(s), float32"
    if part == "text":
        return (
            f"{one['windows']} windows of {one['length']} tokens. Seen: the share of earlier tokens that a query could"
            f" attend to; rules read chunks and see up to a chunk more than they keep. {where}."
        )
    if part == "recall":
        return (
            f"{one['items']} items of {one['length']} tokens: {one['facts']} facts drawn anew, then other text, then"
            f" the beginning of one fact; right is the likeliest of the {one['facts']} values (a guess:"
            f" {1 / one['facts']:.0%}), ± one standard error. Read in chunks of {one['chunk']} tokens; held: the share"
            f" of tokens in the cache before the answer. One seed. {where}."
        )
    loads = [row["machine"]["load_before"] for row in found]
    rounds = min(len(row["rates"]) for row in found)
    taken = f"medians of {rounds} rounds in turn" if rounds > 1 else "a single round, so that speeds compare nothing"
    filled = {bool(row.get("filled")) for row in found}
    how = {
        False: "random tokens were read",
        True: "caches were filled with random keys and values instead of reading a prompt; gates are held open, so that"
        " the share stays; tokens/s are of processor time of the process itself",
    }
    read = "; ".join(how[one] for one in sorted(filled)) + (" (marked *)" if len(filled) > 1 else "")
    return (
        f"{read[0].upper()}{read[1:]}. {one['new_tokens']} tokens decoded after the context; {taken}."
        f" Other work ran on the machine (load {min(loads):.1f} to {max(loads):.1f} on {last['cores']} cores): times"
        f" tell orders of magnitude, bytes are exact. {where}."
    )


def table(part: str, found: Rows) -> list[list[str]]:
    """Header and rows."""
    if part == "text":
        lines = [[_share(row), _method(row), f"{row['seen']:.3f}", f"{row['perplexity']:.2f}"] for row in found]
        return [["share", "method", "seen", "perplexity"], *lines]
    if part == "recall":
        lines = [
            [_share(row), _method(row), f"{row['live']:.3f}", f"{row['bytes'] / 1e6:.3f}", _right(row)] for row in found
        ]
        return [["share", "method", "held", "cache of one item, MB", "right, %"], *lines]
    mixed = len({bool(row.get("filled")) for row in found}) > 1
    lines = [
        [
            str(row["context"]) + ("*" if mixed and row.get("filled") else ""),
            row["method"],
            str(row["batch"]),
            f"{row['live']:.3f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{min(row['rates']):.1f} to {max(row['rates']):.1f}",
        ]
        for row in sorted(found, key=lambda row: (row["context"], row["batch"]))
    ]
    return [["context", "method", "batch", "held", "cache, MB", "decode tokens/s", "rounds"], *lines]


def plots(part: str, found: Rows) -> list[tuple[str, Markup]]:
    """Labels and drawings."""
    if part == "speed":
        drawn: list[tuple[str, Markup]] = []
        for batch in sorted({row["batch"] for row in found}):
            for what, name in (("bytes", "MB of cache"), ("tokens_per_s", "decode tokens/s")):
                scale = 1e6 if what == "bytes" else 1.0
                lines = _lines([row for row in found if row["batch"] == batch], "context", what, scale)
                label = f"{name} against tokens of context, batch {batch}"
                drawn.append((label, curves(lines, label, axis="tokens of context", order=METHODS)))
        return drawn
    value, name = ("perplexity", "perplexity") if part == "text" else ("right", "share of right answers")
    dense = [
        {**row, "method": method} for row in found for method in _methods(found) if row["method"] == _whole(method)
    ]
    others = [row for row in found if row["method"] in _methods(found)]
    held = "seen" if part == "text" else "live"  # what was asked for is the landing's, not that of these texts
    lines = _lines([*dense, *others], held, value, 1.0)
    of_items = found[0]["items"] if part == "recall" else 1
    lines = {method: [(100 * x, y / of_items) for x, y in line] for method, line in lines.items()}
    label = f"{name} against the share of the context that was {'seen' if part == 'text' else 'held'}"
    return [(label, curves(lines, label, percent=part == "recall", axis="share of the context, %", order=METHODS))]


def markdown(rows: Rows) -> str:
    """context.md."""
    text = ["# A cache that forgets", "", INTRO, ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        text += [f"## {model}", ""]
        for part, title in TITLES.items():
            parts = tables(rows, part, model)
            text += [f"### {title}", ""] if parts else []
            for found in parts:
                header, *lines = table(part, found)
                marks = ["---" if name == "method" else "---:" for name in header]
                text += [told(part, found), ""]
                text += [f"| {' | '.join(line)} |" for line in (header, marks, *lines)]
                text.append("")
    return "\n".join(text)


def page(rows: Rows) -> Markup:
    """context.html, which needs nothing else."""
    body = [Markup("<h1>A cache that forgets</h1><p>{}</p>").format(INTRO.replace("`", ""))]
    for model in dict.fromkeys(row["model"] for row in rows):
        body.append(Markup("<h2>{}</h2>").format(model))
        for part, title in TITLES.items():
            parts = tables(rows, part, model)
            body += [Markup("<h3>{}</h3>").format(title)] if parts else []
            for found in parts:
                body.append(Markup("<p>{}</p>").format(told(part, found)))
                for label, drawn in plots(part, found):
                    body.append(Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(drawn, label))
                header, *lines = table(part, found)
                cells = [_row("th", header), *(_row("td", line) for line in lines)]
                body.append(Markup("<table>{}</table>").format(Markup("").join(cells)))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>A cache that forgets</title><style>{STYLE}'
    return Markup(head + "</style><body>") + Markup("\n").join(body) + Markup("</body></html>")


INTRO = (
    "Rules that need no training (window: the first 4 tokens and the latest; KeyDiff; Knorm; H2O; SnapKV) at equal"
    " shares of the context, and learned gates where some were trained, beside the whole cache. With LoRA the body"
    " learned, too, gates and dense alike: so many updates of the same texts. Short runs: few windows and items, one"
    " seed. Made by `benchmarks/context.py`."
)


WHOLE = "dense"
METHODS = (WHOLE, "dense + LoRA", "gates", "gates + LoRA", "window", "keydiff", "knorm", "h2o", "snapkv")
"""Whose colours are the same in all drawings."""


def _methods(found: Rows) -> list[str]:
    return sorted({row["method"] for row in found if not row["method"].startswith(WHOLE)})


def _whole(method: str) -> str:
    """The row of the same body with its whole cache: where a method's line ends."""
    return WHOLE + method.partition(" ")[1] + method.partition(" ")[2]


def _lines(found: Rows, x: str, y: str, scale: float) -> dict[str, list[tuple[float, float]]]:
    """Points of each method, from left to right."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(found, key=lambda row: (row["method"], row[x])):
        lines.setdefault(row["method"], []).append((float(row[x]), row[y] / scale))
    return lines


def _right(row: Mapping[str, Any]) -> str:
    share = row["right"] / row["items"]
    return f"{100 * share:.0f} ± {100 * math.sqrt(share * (1 - share) / row['items']):.0f}"


def _method(row: Mapping[str, Any]) -> str:
    """A method, and how long it learned."""
    return f"{row['method']}, {counted(row['updates'], 'update')}" if "updates" in row else row["method"]


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share']:g}"


def _row(tag: str, cells: Sequence[str]) -> Markup:
    inner = Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(one) for one in cells)
    return Markup("<tr>{}</tr>").format(inner)
