"""Which charts a comparison gets: what remains by layer, how each stage trained, quality against size and against
measured speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compresso.metrics.record import ModelResults
from compresso.report import charts
from compresso.report.columns import OF_A_CLASS, Column, columns, group, lower_is_better
from compresso.report.marks import Point
from compresso.report.read import Comparison, Run
from compresso.report.removed import units_kept
from compresso.report.stage_facts import StageFacts
from compresso.report.table import find

MOST_QUALITIES = 4
"""Numbers drawn against size and speed: two perplexities and two accuracies show what ten would."""
_SUITES = ("commonsense/acc", "reading/acc", "mmlu/acc", "bbh/acc", "world/acc")
_MAJORITY = "held-majority/"
"""What the most frequent label alone would reach, which is no model's doing."""
_SCORES = {
    "Tasks: accuracy": "accuracy",
    "Tasks: exact match": "exact match",
    "Tasks: F1": "F1",
    "Tasks: intersection over union": "mIoU",
}
"""Groups whose numbers are drawn, and what they are called there."""
_OF_TOKENS = ("causal-lm", "masked-lm")
"""Tasks whose loss is a mean over tokens; that of others is over examples or pixels."""
_DRAWN_TOGETHER = {"update", "sparsity", "target", "open", "lambda1", "lambda2", "loss", "language"}


@dataclass(frozen=True)
class Figure:
    """A chart or the table in its place, what stands above it, and what it lacks in words."""

    caption: str
    drawing: Markup
    note: str = ""


def removed(run: Run) -> Figure | None:
    """The heat map of a run; None if the plan names nothing that has a place in a layer."""
    cells = units_kept(run.plan, run.records.stages)
    if not cells:
        return None
    whole = [part for part in ("heads", "FFN units", "hidden") if all(cell.part != part for cell in cells)]
    note = f"Untouched: {', '.join(whole).replace('hidden', 'hidden dimensions')}." if whole else ""
    return Figure(run.name, charts.heat_map(cells), note)


def training(run: Run) -> list[Figure]:
    """The curves of every stage that trained."""
    knobs = run.records.recipe.knobs()
    unit = ", nats a token" if run.records.recipe.task in _OF_TOKENS else ""
    return [
        figure
        for name, stage in run.records.stages.items()
        for figure in _stage(name, stage, knobs.get(name.partition(" ")[0], {}), unit)
    ]


def trade_offs(comparison: Comparison) -> list[Figure]:
    """Quality against parameters and against measured decode speed,
    for pairs of numbers that at least two models have.
    """
    every = columns(number for results in comparison.models for number in results.measurements)
    sizes = [one for one in every if one.name == "parameters/total" and one.how == "counted"][:1]
    speeds = [one for one in every if one.name.startswith("decode/") and one.how == "measured"][:1]
    figures: list[Figure] = []
    for cost in sizes + speeds:
        for quality in _qualities(every):
            drawn = [_point(results, mark, cost, quality) for mark, results in enumerate(comparison.models)]
            points = [point for point in drawn if point is not None]
            if len(points) >= 2:
                figures.append(_trade_off(points, cost, quality))
    return figures


def _qualities(every: Sequence[Column]) -> list[Column]:
    """Measured columns of quality, perplexities and means over suites first."""
    measured = [one for one in every if one.how == "measured"]
    perplexities = [
        one for one in measured if group(one.name) == "Perplexity" and not one.name.endswith("byte_perplexity")
    ]
    tasks = [
        one
        for one in measured
        if group(one.name) in _SCORES and not one.name.startswith(_MAJORITY) and OF_A_CLASS not in one.name
    ]
    tasks.sort(key=lambda one: (one.name not in _SUITES, not one.name.endswith("/miou")))
    half = MOST_QUALITIES // 2
    return perplexities[:half] + tasks[: MOST_QUALITIES - len(perplexities[:half])]


def _point(results: ModelResults, mark: int, cost: Column, quality: Column) -> Point | None:
    x, y = find(results, cost), find(results, quality)
    return None if x is None or y is None else Point(results.name, mark, x.value, y.value, y.stderr)


def _trade_off(points: Sequence[Point], cost: Column, quality: Column) -> Figure:
    is_perplexity = group(quality.name) == "Perplexity"
    what = f"{quality.title} {'perplexity' if is_perplexity else _SCORES[group(quality.name)]}" + (
        f" ({quality.detail})" if quality.detail else ""
    )
    x_title = "parameters, all" if cost.unit == "parameters" else f"{cost.title}, tokens a second"
    lower = lower_is_better(quality.name) is True
    drawing = charts.trade_off(
        points,
        f"{x_title} ({'less' if cost.unit == 'parameters' else 'more'} is better)",
        "less is better" if lower else "more is better",
        f"{what} against {x_title}: {', '.join(point.name for point in points)}",
        x_lower=cost.unit == "parameters",
        y_lower=lower,
        percent=quality.unit == "share",
    )
    return Figure(f"{what} against {'size' if cost.unit == 'parameters' else 'measured speed'}", drawing)


def _stage(name: str, stage: StageFacts, knobs: Mapping[str, object], unit: str) -> list[Figure]:
    column = {key: _points(stage, key) for key in stage.curve if key != "update"}
    if not column or "update" not in stage.curve:
        return []
    figures: list[Figure] = []
    if "sparsity" in column:
        lines = {"expected": column["sparsity"]} | ({"target": column["target"]} if "target" in column else {})
        if "open" in column:
            lines["gates closed"] = [(x, 1 - y) for x, y in column["open"]]
        if stage.kept_share_of_blocks is not None and knobs.get("of") == "blocks":
            lines["removed in the end"] = [(column["sparsity"][-1][0], 1 - stage.kept_share_of_blocks)]
        drawing = charts.curves(lines, f"Sparsity in {name}: {', '.join(lines)}", percent=True, dashed=("target",))
        figures.append(Figure(f"{name}: sparsity", drawing))
    multipliers = {key: column[key] for key in ("lambda1", "lambda2") if key in column}
    if multipliers:
        figures.append(
            Figure(f"{name}: multipliers of the penalty", charts.curves(multipliers, f"Lagrange multipliers in {name}"))
        )
    elif "sparsity" in column:
        figures[-1] = Figure(
            figures[-1].caption, figures[-1].drawing, "No multipliers: the budget is held by projection."
        )
    losses = {key: column[key] for key in ("language", "loss") if key in column}
    if losses:
        same = len(losses) == 2 and losses["language"] == losses["loss"]
        if same:
            losses = {"loss": losses["loss"]}
        else:
            words = {"language": "next-token loss", "loss": "with penalty" if len(losses) == 2 else "loss"}
            losses = {words[key]: points for key, points in losses.items()}
        figures.append(Figure(f"{name}: training loss{unit}", charts.curves(losses, f"Training loss in {name}")))
    for key in sorted(column.keys() - _DRAWN_TOGETHER):
        figures.append(Figure(f"{name}: {key}", charts.curves({key: column[key]}, f"{key} in {name}")))
    return figures


def _points(stage: StageFacts, key: str) -> list[tuple[float, float]]:
    """A column over updates, without the updates that did not log it."""
    rows = zip(stage.curve["update"], stage.curve[key], strict=False) if "update" in stage.curve else ()
    return [(x, y) for x, y in rows if x is not None and y is not None]
