"""The table of `refusals.py`: results/refusals.jsonl -> results/refusals.md and, for the catalogue,
commands/measured_refusals.json of the package.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import compresso
from common import RESULTS
from compresso.metrics.intervals import wilson
from compresso.metrics.record import Change
from compresso.metrics.trust.asking import Answer
from compresso.metrics.trust.refusal_prompts import BARE, BENIGN, Prompt
from compresso.metrics.trust.refusal_suite import Asked, broken_marks, refusal_changes
from compresso.metrics.trust.refusals import Kind
from compresso.metrics.trust.soundness import broken_by_answers, broken_by_loss
from trust_report import loss

LINES = RESULTS / "refusals.jsonl"
METHODS = ("dense", "wanda-attention-20", "wanda-all-20", "wanda-mlp-20", "wanda-attention-10", "wanda-attention-30")
"""In the order that a table which is cut short wants."""
ASKED = ("model", "limit", "benign", "new_tokens", "prompts_sha256")
_PARTS = {"attention": "attention's weights", "mlp": "the MLP's weights", "all": "all weights of the blocks"}
PAPER = "arXiv 2401.10862"
Line = Mapping[str, Any]


def rows() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in LINES.read_text("utf-8").splitlines()] if LINES.exists() else []


def asked(row: Line) -> list[Asked]:
    """The answers, as the suite has them; of the texts only what they are is known."""
    found: list[Asked] = []
    for key, kind in row["answers"].items():
        template, category, *rest = key.removeprefix(f"{BENIGN}/").split("/")
        benign = key.startswith(f"{BENIGN}/")
        prompt = Prompt(key, template, BENIGN if benign else category, "" if benign else rest[1], "", "")
        found.append(Asked(prompt, Answer(""), Kind(kind)))
    return found


def broken(dense: Line, row: Line) -> str:
    """Why a model is not compared; "" if it is."""
    by_loss = broken_by_loss(loss(dense, "plain"), loss(row, "plain"))
    return by_loss or broken_by_answers(broken_marks(asked(dense)), broken_marks(asked(row)))


def changes(dense: Line, row: Line) -> dict[str, Change]:
    """What became of refusals and of benign compliance, by name."""
    return {one.name: one for one in refusal_changes(asked(dense), asked(row), broken(dense, row))}


def report() -> None:
    """Write the table."""
    done = rows()
    dense = [row for row in done if row["method"] == "dense"]
    if not dense:
        return
    text = ["# Refusals where one part of a chat model is pruned"]
    for one in dense:
        mine = [row for row in done if row is not one and all(row[key] == one[key] for key in ASKED)]
        text += ["", *_section(one, sorted(mine, key=lambda row: row["method"]))]
    (RESULTS / "refusals.md").write_text("\n".join([*text, ""]), "utf-8")
    catalogue = Path(compresso.__file__).parent / "commands" / "measured_refusals.json"
    catalogue.write_text(json.dumps(costs(done), indent=1, ensure_ascii=False) + "\n", "utf-8")


def costs(done: Sequence[Line]) -> dict[str, Any]:
    """What the catalogue says of each method."""
    told: list[dict[str, Any]] = []
    for dense in (row for row in done if row["method"] == "dense"):
        for row in done:
            if row is not dense and all(row[key] == dense[key] for key in ASKED):
                part, _, share = row["method"].removeprefix("wanda-").partition("-")
                what = f"refusals where {share} % of {_PARTS[part]} become zero"
                told.append({"stages": ["wanda"], "what": what, "on": row["model"], "found": found(dense, row)})
    how = "benchmarks/refusals.py, greedy, shortened: intervals are wide, and small models refuse little"
    return {"how": how, "rows": [{**one, "by": "compresso"} for one in told]}


def found(dense: Line, row: Line) -> str:
    """What became of refusals and of benign tasks, in a sentence."""
    told: list[str] = []
    for said, place, kind in (("refused", 0, Kind.REFUSAL), ("benign ones answered", 1, Kind.ANSWERED)):
        before, after = (_split(one)[place] for one in (dense, row))
        counts = [sum(one.kind is kind for one in mine) for mine in (before, after)]
        told.append(f"{said}: {counts[0]} of {len(before)} before, {counts[1]} of {len(after)} after")
    growth = math.exp(loss(row, "wikitext2").mean - loss(dense, "wikitext2").mean)
    return "; ".join([f"perplexity x {growth:.2f}", *told, *filter(None, [broken(dense, row)])])


def _section(dense: Line, mine: Sequence[Line]) -> Iterator[str]:
    n, n_benign = (len(one) for one in _split(dense))
    first = next(iter(mine), dense)
    where = dense["machine"].get("cuda") or dense["machine"]["processor"]
    yield (
        f"`benchmarks/refusals.py` on {dense['model']}, float32, {where}: {n} prompts of"
        f" {PAPER}, a stratified {dense['limit']:g} % of 2475, and {n_benign} benign ones in the same templates,"
        f" greedy, at most {dense['new_tokens']} new tokens (there: all of both, and up to 1000 with the request)."
        f" Calibration: {first['examples']} examples of {first['length']} tokens. Shares in percent with 95 %"
        " intervals; differences in points, paired by prompt, with the exact p of McNemar's test."
    )
    yield ""
    yield (
        "| pruned | zeros of all block weights | perplexity | refused | by the published strings | difference | p |"
        " benign answered | difference | p | broken answers | verdict |"
    )
    yield "|---|" + "---:|" * 10 + "---|"
    for row in (dense, *mine):
        yield f"| {' | '.join(_cells(dense, row))} |"
    yield ""
    yield (
        "Benign answered: neither refused nor empty nor looping; nobody judged whether the answer is of use. Broken:"
        f" empty or looping within {dense['new_tokens']} tokens, where many loops have not begun."
    )
    yield ""
    by_template = [_templates(row) for row in (dense, *mine)]
    if any(refused for one in by_template for refused, _ in one.values()):
        yield from _by_template(by_template, [row["method"].removeprefix("wanda-") for row in (dense, *mine)])
    else:
        yield "No model refuses any prompt, in any template."
    yield ""
    yield (
        "What a small model refuses says little of a large one: the paper's gain grew with how safe a 7B chat model was"
        " before, and was nearly nothing for the least safe. Intervals that hold 0 are no sign of safety kept. A rise"
        " of refusals beside fewer benign tasks answered is no gain, and neither is one of a model whose answers are"
        " broken."
    )


def _by_template(by_template: Sequence[Mapping[str, tuple[int, int]]], names: Sequence[str]) -> Iterator[str]:
    yield "Refused by template:"
    yield ""
    yield f"| template | n | {' | '.join(names)} |"
    yield "|---|---:|" + "---:|" * len(names)
    for name, (_, total) in by_template[0].items():
        cells = " | ".join(str(one.get(name, (0, 0))[0]) for one in by_template)
        yield f"| {'none' if name == BARE else name} | {total} | {cells} |"


def _cells(dense: Line, row: Line) -> Iterator[str]:
    harmful, benign = _split(row)
    perplexity = math.exp(loss(row, "wikitext2").mean)
    yield row["method"].removeprefix("wanda-")
    yield f"{100 * row.get('zeros', 0):.1f} %"
    yield f"{perplexity:.1f}"
    found = {} if row is dense else changes(dense, row)
    published = set(row["published"])
    yield _share([one.refused for one in harmful])
    yield f"{100 * sum(one.prompt.id in published for one in harmful) / len(harmful):.1f}"
    yield from _difference(found.get("refusal/rate"))
    yield _share([one.kind is Kind.ANSWERED for one in benign])
    yield from _difference(found.get("benign/compliance"))
    yield _share([one.kind in (Kind.DEGENERATE, Kind.EMPTY) for one in (*harmful, *benign)])
    yield "" if row is dense else _verdict(found, broken(dense, row))


def _verdict(found: Mapping[str, Change], why: str) -> str:
    if why:
        return f"not comparable: {why}"
    words = {"refusal/rate": "refusals", "benign/compliance": "benign answers"}
    return "; ".join(f"{said} {found[name].verdict}" for name, said in words.items() if name in found)


def _split(row: Line) -> tuple[list[Asked], list[Asked]]:
    """Harmful and benign ones that left room for an answer."""
    found = [one for one in asked(row) if one.kind is not Kind.NO_ROOM]
    return [one for one in found if one.prompt.category != BENIGN], [
        one for one in found if one.prompt.category == BENIGN
    ]


def _templates(row: Line) -> dict[str, tuple[int, int]]:
    """Of each template, how many were refused, of how many."""
    found: dict[str, tuple[int, int]] = {}
    for one in _split(row)[0]:
        refused, n = found.get(one.prompt.template, (0, 0))
        found[one.prompt.template] = refused + one.refused, n + 1
    return found


def _difference(change: Change | None) -> Iterator[str]:
    """The rise in points with its interval, and p."""
    if change is None or change.difference is None or change.low is None or change.high is None:
        yield from ("", "")
        return
    yield f"{_points(change.difference, 1)} ({_points(change.low)} to {_points(change.high)})"
    yield f"{change.p:.2g}"


def _share(marks: Sequence[bool]) -> str:
    value = sum(marks) / len(marks)
    low, high = wilson(value, len(marks))
    return f"{100 * value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _points(share: float, digits: int = 0) -> str:
    return f"{100 * share:+.{digits}f}".replace("-", "\u2212")
