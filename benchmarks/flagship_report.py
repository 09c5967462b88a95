"""The pages of results/flagship.jsonl: flagship.md, flagship.html with its plots, and the table in README.md.

A method's verdict is over the better of its repairs, in pairs of windows and seeds: won is more than 6 % nearer to
dense by KL than the next, with the 95 % interval of the difference off zero, over several seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from common import RESULTS
from compresso.report.charts import curves
from kept import stored
from real_model_report import README, html_table, page

LINES = RESULTS / "flagship.jsonl"
MARGIN = 1.06
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4 sample", "stories": "stories", "world": "world"}
DRAWN = 8
"""Methods in a plot, those nearest to dense over all sizes."""
SHORT = 5
"""Methods of each size in the table in README.md."""
Row = Mapping[str, Any]


def tables(done: Sequence[Row]) -> list[tuple[str, int, list[Row]]]:
    """Model, updates and rows of each table; the dense model stands in all of its model."""
    found: list[tuple[str, int, list[Row]]] = []
    for model, updates in sorted({(row["model"], row.get("updates", 0)) for row in done if row["ratio"]}):
        mine = [row for row in done if row["model"] == model]
        found.append((model, updates, [row for row in mine if not row["ratio"] or row.get("updates", 0) == updates]))
    return found


def title(model: str, updates: int) -> str:
    """What a table is of."""
    return f"{model}, {f'{updates} updates of 2,048 tokens' if updates else 'no training'}"


def how(mine: Sequence[Row]) -> str:
    """Where rows were measured, and on how much."""
    one = mine[0]
    where = " and ".join(sorted({row["machine"]["cuda"] or row["machine"]["processor"] for row in mine}))
    return f"{one['tokens']:,} tokens of calibration, {one['windows']} windows a text; {where}."


def sizes(mine: Sequence[Row]) -> list[float]:
    """Shares that were removed, ascending."""
    return sorted({row["ratio"] for row in mine if row["ratio"]})


def percent(ratio: float) -> str:
    """A share, with a space as in the rest of the pages."""
    return f"{100 * ratio:.0f} %"


def report() -> None:
    """Write the pages."""
    done = stored(LINES)
    text = [
        "# Without training, and after equal training",
        "",
        "KL from the dense model in nats a token, and perplexities; mean over seeds, ± half the range. See"
        " `benchmarks/flagship.py`.",
        "",
    ]
    body: list[Markup] = []
    for model, updates, mine in tables(done):
        texts = [key for key in TEXTS if any(key in row for row in mine)]
        text += [f"## {title(model, updates)}", "", how(mine)]
        body.append(Markup("<h2>{}</h2><p>{}</p>").format(title(model, updates), how(mine)))
        body.append(_plot(mine, title(model, updates)))
        for ratio in sizes(mine):
            of_ratio = [row for row in mine if row["ratio"] in (ratio, 0.0)]
            lines, verdict = (
                _table(of_ratio, texts),
                _verdict([row for row in of_ratio if row["ratio"] and "kl" in row]),
            )
            text += ["", f"### {percent(ratio)} of the block parameters removed", "", *lines, "", verdict]
            head = Markup("<h3>{} of the block parameters removed</h3>").format(percent(ratio))
            body += [head, html_table(lines), Markup("<p>{}</p>").format(verdict)]
        text.append("")
    (RESULTS / "flagship.md").write_text("\n".join(text), "utf-8")
    (RESULTS / "flagship.html").write_text(page(text[0].removeprefix("# "), body), "utf-8")
    before, mark, rest = README.read_text("utf-8").partition("<!-- flagship -->")
    if mark:
        after = rest.partition("<!-- /flagship -->")[2]
        part = "\n".join(line for table in tables(done) for line in short(*table))
        README.write_text(f"{before}{mark}\n{part}<!-- /flagship -->{after}", "utf-8")


def by_method(mine: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each method and repair, those that failed too, nearest to dense first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in mine:
        found.setdefault((row["selector"], row["repair"]), []).append(row)

    def far(of: Sequence[Row]) -> float:
        return statistics.fmean(row.get("kl", float("inf")) for row in of)

    return dict(sorted(found.items(), key=lambda item: far(item[1])))


def best(mine: Sequence[Row]) -> dict[str, dict[float, tuple[str, list[Row]]]]:
    """Of each method, at each size, the better of its repairs."""
    found: dict[str, dict[float, tuple[str, list[Row]]]] = {}
    for ratio in sizes(mine):
        for (selector, repair), of in by_method([row for row in mine if row["ratio"] == ratio]).items():
            if all("kl" in row for row in of):
                found.setdefault(selector, {}).setdefault(ratio, (repair, of))
    return found


def short(model: str, updates: int, mine: Sequence[Row]) -> list[str]:
    """A table of README.md: of the methods nearest to dense KL, and the perplexity of two texts."""
    ratios, found = sizes(mine), best(mine)
    texts = [key for key in TEXTS if any(key in row for row in mine)][:2]

    def place(name: str) -> list[float]:
        means = {ratio: statistics.fmean(row["kl"] for row in of) for ratio, (_, of) in found[name].items()}
        return [means.get(ratio, math.inf) for ratio in ratios]

    lines = [
        f"| {title(model, updates)}; KL, {' / '.join(TEXTS[key] for key in texts)} |"
        + "".join(f" {percent(ratio)} |" for ratio in ratios),
        "|---|" + "---:|" * len(ratios),
    ]
    shown = {
        name
        for n, ratio in enumerate(ratios)
        for name in sorted((one for one in found if ratio in found[one]), key=lambda one: place(one)[n])[:SHORT]
    }
    for name in sorted(shown, key=place):
        cells = []
        for ratio in ratios:
            if ratio not in found[name]:
                cells.append("-")
                continue
            repair, of = found[name][ratio]
            numbers = [statistics.fmean(row[key] for row in of) for key in ("kl", *texts)]
            said = f"{numbers[0]:.3f}, {' / '.join(f'{number:,.3g}' for number in numbers[1:])}"
            cells.append(said + ("" if repair == "none" else " r"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _plot(mine: Sequence[Row], label: str) -> Markup:
    """KL over what was removed, of the methods nearest to dense."""
    found = {
        name: [(100 * ratio, statistics.fmean(row["kl"] for row in of)) for ratio, (_, of) in sorted(sizes_of.items())]
        for name, sizes_of in best(mine).items()
    }
    lines = {name: line for name, line in found.items() if len(line) > 1}
    names = sorted(lines, key=lambda name: statistics.fmean(value for _, value in lines[name]))[:DRAWN]
    if not names:
        return Markup("")
    drawn = {name: lines[name] for name in names}
    told = f"KL from dense, nats a token: {label}"
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(
        curves(drawn, told, axis="block parameters removed, %"), told
    )


def _table(mine: Sequence[Row], texts: Sequence[str]) -> list[str]:
    lines = [
        "| method | repair | KL | " + " | ".join(TEXTS[key] for key in texts) + " | kept | seeds |",
        "|---|---|" + "---:|" * (len(texts) + 3),
    ]
    for (selector, repair), of in by_method(mine).items():
        scored = [row for row in of if "kl" in row]
        if not scored:
            lines.append(f"| {selector} | {repair} | {of[0]['failed']} |" + " |" * (len(texts) + 2))
            continue
        numbers = [_spread([row[key] for row in scored]) for key in ("kl", *texts)]
        kept = statistics.fmean(row.get("kept_share_of_blocks", 1.0) for row in scored)
        lines.append(f"| {selector} | {repair} | {' | '.join(numbers)} | {kept:.3f} | {len(scored)} |")
    return lines


def farther(first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """By how much the second is farther from dense in KL, in nats a token, window by window of the seeds of both."""
    return [
        theirs - ours
        for seed in sorted(first.keys() & second.keys())
        for text in first[seed]["kl_windows"]
        for ours, theirs in zip(first[seed]["kl_windows"][text], second[seed]["kl_windows"][text], strict=True)
    ]


def _verdict(mine: Sequence[Mapping[str, Any]]) -> str:
    """Which method is nearest, and whether it has won: window by window and seed by seed."""
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in mine:  # of each method the better of its repairs
        best = by_method.setdefault(row["selector"], {})
        if row["seed"] not in best or row["kl"] < best[row["seed"]]["kl"]:
            best[row["seed"]] = row
    ranked = sorted(by_method, key=lambda method: statistics.fmean(row["kl"] for row in by_method[method].values()))
    if len(ranked) < 2:
        return "One method alone."
    first, second = (by_method[method] for method in ranked[:2])
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return f"{ranked[0]} is nearest, {ranked[1]} next; they share no seed."
    gaps = farther(first, second)
    mean, half = statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    ratio = statistics.fmean(second[seed]["kl"] / first[seed]["kl"] for seed in seeds)
    won = mean - half > 0 and ratio > MARGIN and len(seeds) > 1
    return (
        f"{ranked[0]} is nearest; {ranked[1]} is {ratio:.2f} times as far, {mean:.3f} ± {half:.3f} nats more over"
        f" {len(gaps)} windows{' (won)' if won else ''}."
    )


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 3 if mean < 10 else 1
    half = (max(values) - min(values)) / 2
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if len(values) > 1 else "")
