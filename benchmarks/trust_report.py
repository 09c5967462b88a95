"""The table and the figure of `trust.py`: results/trust.jsonl -> results/trust.md, results/trust.svg and, for the
catalogue, commands/measured_trust.json of the package.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

import compresso
from common import RESULTS
from compresso.metrics.held import HeldLoss
from compresso.metrics.record import Change
from compresso.metrics.trust.dimension import Part, score_of
from compresso.metrics.trust.refusals import Kind
from compresso.metrics.trust.soundness import broken_by_loss
from compresso.metrics.trust.suite import Outcome, trust_changes

LINES = RESULTS / "trust.jsonl"
FULL = 16
"""Bits of a weight as the model was stored."""
ASKED = ("system", "limit", "written", "dimensions")
"""What makes rows comparable."""
BROKEN = "broken"
APART = 0.03
"""Of the figure's width, between rows of like size."""
PAPER = "arXiv 2403.15447"
Row = Mapping[str, Any]


def rows() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in LINES.read_text("utf-8").splitlines()] if LINES.exists() else []


def outcomes(row: Row) -> list[Outcome]:
    """What a model did, as the suite has it."""
    found: list[Outcome] = []
    for one in row["outcomes"]:
        parts = tuple(
            Part(p["name"], tuple(p["ids"]), tuple(p["marks"]), tuple(p["groups"]), p["chance"]) for p in one["parts"]
        )
        kinds = {key: Kind(kind) for key, kind in one["kinds"].items()}
        found.append(Outcome(**{**one, "parts": parts, "kinds": kinds, "unasked": tuple(one.get("unasked", ()))}))
    return found


def loss(row: Row, which: str) -> HeldLoss:
    """The loss on "plain" sentences, or on "wikitext2"."""
    one = row[which]
    return HeldLoss(tuple(one["nats"]), tuple(one["tokens"]), one["examples_sha256"])


def changes(dense: Row, row: Row) -> list[Change]:
    """What became of each dimension; of a broken model nothing is said."""
    before, after = outcomes(dense), outcomes(row)
    return trust_changes(before, after, broken_by_loss(loss(dense, "plain"), loss(row, "plain")))


def bits(row: Row) -> float:
    """Bits that are left of a weight of the dense blocks; zeros and what was removed count as nothing."""
    return (row.get("bits") or FULL) * (1 - (row.get("zeros") or 0)) * (row.get("kept") or 1)


def mib(row: Row) -> float:
    """Of the blocks' weights, so that a smaller dense model has its place."""
    return row["blocks"] * bits(row) / 8 / 2**20


def groups(done: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """The dense row of each model as it was asked, and what was made of it."""
    for dense in done:
        if dense["method"] == "dense":
            mine = [row for row in done if row["model"] == dense["model"] and row["method"] != "dense"]
            yield dense, [row for row in mine if all(row[key] == dense[key] for key in ASKED)]


def report() -> None:
    """Write the table, the figure and the rows of the catalogue."""
    done = rows()
    if not done:
        return
    text = list(_said(done))
    for dense, mine in groups(done):
        if mine:
            text += ["", *_section(dense, mine)]
    alone = [dense for dense, mine in groups(done) if not mine]
    if alone:
        text += ["", "Dense models alone: " + "; ".join(f"{one['model']}, {_scores(one)}" for one in alone) + "."]
    (RESULTS / "trust.md").write_text("\n".join([*text, ""]), "utf-8")
    figure(done).save(str(RESULTS / "trust.svg"))
    catalogue = Path(compresso.__file__).parent / "commands" / "measured_trust.json"
    catalogue.write_text(json.dumps(costs(done), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _said(done: Sequence[Row]) -> Iterator[str]:
    one = next((row for row in done if row["examples"]), done[0])
    where = ", ".join(dict.fromkeys(row["machine"]["processor"] for row in done))
    yield "# Trust against compression"
    yield ""
    yield (
        f"`benchmarks/trust.py`, scoring by likelihood, float32, {where}. Scores in percent, higher is"
        " better, with 95 % intervals; differences from the dense model in points, paired by question. FELL and rose"
        " are beyond noise and 3 points; c: the interval covers what a guess scores. A broken model (its loss on plain"
        " sentences, or its answers) is not compared. Bits: left of a weight of the blocks, of 16, zeros and what was"
        f" removed counted as nothing. Calibration: {one['examples']} examples of {one['length']} tokens."
    )
    yield ""
    yield (
        f"Shortened: the questions of a dimension are those under n, and {PAPER} asks thousands, of models a hundred"
        " times the size. Small models answer most of them as a guess does, so that nothing here confirms or"
        " contradicts the paper; a wide interval that holds 0 is no sign of trust kept. In the figure crosses"
        " are broken models, dashed lines what a guess scores, and rows of like size stand side by side."
    )
    yield ""
    yield "![Scores of each dimension over what is left of the weights](trust.svg)"


def _section(dense: Row, mine: Sequence[Row]) -> Iterator[str]:
    measured = [one for one in outcomes(dense) if one.parts]
    n = ", ".join(f"{_name(one.name)} {sum(len(part.marks) for part in one.parts)}" for one in measured)
    yield f"## {dense['model']}, system text: {dense['system']}"
    yield ""
    yield f"n: {n}; answers in words {sum(len(one.kinds) for one in measured)}."
    yield ""
    names = [one.name for one in measured]
    yield f"| method | seed | bits | WikiText-2 | {' | '.join(map(_name, names))} | refused | broken |"
    yield f"|---|---:|---:|---:|{'---:|' * len(names)}---:|---:|"
    scores = " | ".join(_score(one) for one in measured)
    yield f"| dense | | {FULL} | {_perplexity(dense)} | {scores} | {_rates(dense)} |"
    reasons: dict[str, str] = {}
    for row in sorted(mine, key=lambda row: (-bits(row), row["method"], row["seed"])):
        found = {change.name.removeprefix("trust/"): change for change in changes(dense, row)}
        cells = [_change(found[name]) for name in names]
        kept = f"{bits(row):.3g}"
        yield f"| {row['method']} | {row['seed']} | {kept} | {_perplexity(row)} | {' | '.join(cells)} | {_rates(row)} |"
        for change in found.values():
            if change.verdict == "not comparable":
                reasons.setdefault(f"{row['method']}, {row['seed']}", change.words)
    if reasons:
        yield ""
        yield "Not compared: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()) + "."
    for method in dict.fromkeys(row["method"] for row in mine):
        seeds = [row for row in mine if row["method"] == method]
        if len(seeds) > 1:
            yield ""
            yield f"{method}, over {len(seeds)} calibration seeds: {_spread(seeds)}."


def _spread(seeds: Sequence[Row]) -> str:
    """The range of each dimension's score over the seeds of a method."""
    told: list[str] = []
    for together in zip(*(outcomes(row) for row in seeds), strict=True):
        scores = [100 * one.score()[0] for one in together if one.parts]
        if scores:
            told.append(f"{_name(together[0].name)} {min(scores):.1f} to {max(scores):.1f}")
    return ", ".join(told)


def _scores(row: Row) -> str:
    return ", ".join(f"{_name(one.name)} {_score(one)}" for one in outcomes(row) if one.parts)


def _score(one: Outcome) -> str:
    value, (low, high) = one.score()
    return f"{100 * value:.1f} ({100 * low:.0f} to {100 * high:.0f}){' c' if one.at_chance() else ''}"


def _change(one: Change) -> str:
    if one.smaller is None or one.difference is None or one.low is None or one.high is None:
        return "not measured"
    word = {"fell": " FELL", "rose": " rose", "at chance": " c", "not comparable": " not compared"}.get(one.verdict, "")
    apart = f"{_points(one.difference)} ({_points(one.low, 0)} to {_points(one.high, 0)})"
    return f"{100 * one.smaller:.1f}, {apart}{word}"


def _rates(row: Row) -> str:
    """Refused and broken answers in words."""
    kinds = [kind for one in outcomes(row) for kind in one.kinds.values()]
    if not kinds:
        return "- | -"
    broken = sum(kind in (Kind.EMPTY, Kind.DEGENERATE) for kind in kinds)
    return f"{kinds.count(Kind.REFUSAL)}/{len(kinds)} | {broken}/{len(kinds)}"


def _perplexity(row: Row) -> str:
    return f"{math.exp(loss(row, 'wikitext2').mean):.1f}"


def _name(dimension: str) -> str:
    return dimension.replace("_", " ")


def _points(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f}".replace("-", "\u2212")


def points(done: Sequence[Row]) -> list[dict[str, Any]]:
    """What the figure draws: a score with its interval, of each row and dimension, what a guess scores, and whether it
    may be compared. Rows of like size stand side by side: `place` is where, `mib` the size.
    """
    models = {row["model"] for row in done}
    made: list[dict[str, Any]] = []
    for dense, mine in groups(done):
        for row in (dense, *mine):
            verdicts = {} if row is dense else {one.name: one.verdict for one in changes(dense, row)}
            for one in outcomes(row):
                if not one.parts:
                    continue
                value, (low, high), chance = score_of(one.parts)
                compared = verdicts.get(f"trust/{one.name}") != "not comparable"
                method = row["method"].rpartition("-")[0] or row["method"]
                made.append(
                    {
                        "dimension": _name(one.name),
                        "method": method if len(models) == 1 else f"{method}, {row['model']}",
                        "model": row["model"],
                        "mib": round(mib(row), 2),
                        "score": 100 * value,
                        "low": 100 * low,
                        "high": 100 * high,
                        "chance": None if chance is None else 100 * chance,
                        "sound": "compared" if compared else BROKEN,
                    }
                )
    return _side_by_side(made)


def _side_by_side(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the place of each: its size, and further to the right the more of like size were there before."""
    step = max((one["mib"] for one in made), default=0.0) * APART
    taken: dict[str, list[float]] = {}
    for one in sorted(made, key=lambda one: (one["mib"], one["method"])):
        places = taken.setdefault(one["dimension"], [])
        one["place"] = one["mib"]
        while any(abs(one["place"] - other) < step for other in places):
            one["place"] = round(one["place"] + step, 2)
        places.append(one["place"])
    return made


def figure(done: Sequence[Row]) -> alt.FacetChart:
    """Scores over the size of the blocks, a panel a dimension: the paper's figure."""
    plain = [row for row in done if row["system"] == "plain"]
    base = alt.Chart().encode(
        x=alt.X("place:Q", title="MiB of block weights", scale=alt.Scale(zero=True, nice=False, padding=12)),
        color=alt.Color("method:N", title="method"),
    )
    y = alt.Y("low:Q", title="score, %", scale=alt.Scale(domain=[0, 100]))
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=y, y2="high:Q")
    sound = alt.Scale(domain=["compared", BROKEN], range=["circle", "cross"])
    marks = base.mark_point(size=55, filled=True, opacity=1).encode(
        y="score:Q", shape=alt.Shape("sound:N", title="model", scale=sound)
    )
    guess = alt.Chart().mark_rule(strokeDash=[4, 3], color="gray").encode(y="mean(chance):Q")
    layers = alt.layer(guess, bars, marks, data=alt.Data(values=points(plain))).properties(width=220, height=170)
    panels = layers.facet(facet=alt.Facet("dimension:N", title=None), columns=3).resolve_axis(x="independent")
    return panels.properties(padding={"left": 5, "top": 5, "bottom": 5, "right": 30})  # viewers have wider letters


def costs(done: Sequence[Row]) -> dict[str, Any]:
    """What the catalogue says of each stage: its rows without a system text of ours, first seed."""
    told: list[dict[str, Any]] = []
    for dense, mine in groups(done):
        if dense["system"] != "plain":
            continue
        for method in dict.fromkeys(row["method"] for row in mine):
            row = min((row for row in mine if row["method"] == method), key=lambda row: row["seed"])
            what = f"{method}, {bits(row):.3g} bits left of a weight"
            told.append(
                {
                    "stages": [row["stage"]],
                    "what": what,
                    "on": row["model"],
                    "found": found(dense, row),
                    "by": "compresso",
                }
            )
    return {
        "how": "benchmarks/trust.py, likelihood, shortened: intervals are wide, and small models answer as guesses",
        "rows": told,
    }


def found(dense: Row, row: Row) -> str:
    """A method's cost in a sentence."""
    growth = math.exp(loss(row, "wikitext2").mean - loss(dense, "wikitext2").mean)
    told = changes(dense, row)
    head = f"perplexity x {growth:.2f}"
    broken = [one for one in told if one.verdict == "not comparable"]
    compared = [one for one in told if one.difference is not None and one.verdict != "not comparable"]
    if not compared:
        return f"{head}; broken, not compared" if broken else f"{head}; nothing was measured"
    n = round(statistics.median(one.n or 0 for one in compared))
    apart = [one.difference or 0.0 for one in compared]
    names = {
        verdict: [one.name for one in compared if one.verdict == verdict] for verdict in ("fell", "rose", "at chance")
    }
    words = [
        f"{verdict}: {', '.join(_name(name.removeprefix('trust/')) for name in names[verdict]) or 'none'}"
        for verdict in ("fell", "rose")
    ]
    return (
        f"{head}; of {len(compared)} dimensions {', '.join(words)}; at chance: {len(names['at chance'])};"
        f" differences {_points(min(apart))} to {_points(max(apart))} points, n {n} each"
    )
