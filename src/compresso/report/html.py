"""One self-contained HTML page: no script, no network, light and dark, for screens, phones and paper.

Names of models, samples and recipes are untrusted text. jinja2 escapes all of it, the only markup let through is what
`charts` drew, and the page's own content policy forbids scripts and requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.overwrite import first_bytes
from compresso.core.plan import Plan
from compresso.errors import ExportError
from compresso.metrics.record import ModelResults, Sample, Segmented
from compresso.report import charts, facts, figures
from compresso.report.columns import QUALITY, Column, column_key, columns, group, written
from compresso.report.cures import cure
from compresso.report.done import deeds, kept_of, participle, removed_kinds
from compresso.report.marks import drawable
from compresso.report.read import Comparison, Run, comparison_of_run
from compresso.report.records import RunRecords
from compresso.report.remarks import remarks_in, remarks_of
from compresso.report.stage_table import stage_table
from compresso.report.table import (
    NOT_MEASURED,
    Cell,
    Table,
    against,
    find,
    missing,
    noise_floor,
    not_comparable,
    tables,
    within_noise,
)
from compresso.report.templating import environment
from compresso.report.trust_rows import TITLES, trust_rows
from compresso.tasks.base import task_named

GENERATOR = '<meta name="generator" content="compresso">'
"""What tells a report from another file that lies at its place."""
MOST_COLUMNS = 8
_VERDICTS = {
    "ok": "passed",
    "warn": "warning",
    "refuse": "refused, written with --allow-collapsed",
    "unchecked": "not known",
}
_NOISE = {True: " · within noise", False: " · beyond noise", None: ""}


def write_report(path: str | Path, comparison: Comparison, commands: Mapping[str, str] | None = None) -> None:
    """Write a comparison as one HTML file, whole or not at all.

    Args:
        path: the file.
        comparison: what it shows.
        commands: what to show for engines that opened a result, as in `facts.loading`; None for nothing.

    Raises:
        ExportError: if a folder or a file that is no report lies at `path`.
        ResourceError, CheckpointError: if it cannot be written.
    """
    check_target(path)
    write_text(Path(path).expanduser(), page(comparison, commands))


def check_target(path: str | Path) -> None:
    """Refuse to replace what is not a report. Raises ExportError."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ExportError(f"--output {path} is a folder; name a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ExportError(f"--output {path}: there is no folder {path.parent}; make it, or choose another output")
    if path.exists() and GENERATOR.encode() not in first_bytes(path):
        raise ExportError(f"--output {path} exists and is not a report of compresso; choose another name")


def report_of_run(records: RunRecords, plan: Plan, commands: Mapping[str, str] | None = None) -> str:
    """The page of one run, from what its records.json will hold; `commands` as in `write_report`."""
    return page(comparison_of_run(records, plan), commands)


def page(comparison: Comparison, commands: Mapping[str, str] | None = None) -> str:
    """The HTML text; `commands` as in `write_report`."""
    templates = environment(escaped=True)
    drawn, runs = tables(comparison), [_run(run, commands or {}) for run in comparison.runs]
    style = templates.loader.get_source(templates, "report.css")[0] if templates.loader else ""
    text = templates.get_template("report.html.jinja").render(
        comparison=comparison,
        style=Markup(style),
        generator=Markup(GENERATOR),
        summary=[_summary(comparison, one) for one in comparison.models if one.fingerprint not in comparison.dense],
        runs=runs,
        staged=any(run["stages"] for run in runs),
        placed=any(run["removed"] for run in runs),
        lost=any(run["lost"] for run in runs),
        quality=[part for table in drawn if table.title in QUALITY for part in _for_paper(table)],
        other=[part for table in drawn if table.title not in QUALITY for part in _for_paper(table)],
        missing=missing(comparison),
        cure=_code(cure(comparison)),
        trust=[(one.name, TITLES, trust_rows(one.changes)) for one in comparison.models if one.changes],
        trade_offs=figures.trade_offs(comparison),
        charts=charts.can_draw(),
        prompts=_prompts(comparison.models),
        pictures=_pictures(comparison.models),
        protocols=_protocols(comparison),
        remarks=[line for table in drawn for line in remarks_in(table.columns, table.rows)],
        words=cell_words,
    )
    return drawable(text)


def _for_paper(table: Table) -> list[Table]:
    """The table in parts that a sheet of paper holds side by side."""
    n = len(table.columns)
    starts = range(0, n, MOST_COLUMNS)
    parts: list[Table] = []
    for start in starts:
        chosen = slice(start, start + MOST_COLUMNS)
        title = table.title if n <= MOST_COLUMNS else f"{table.title}, part {len(parts) + 1} of {len(starts)}"
        rows = tuple(replace(row, cells=row.cells[chosen]) for row in table.rows)
        parts.append(Table(title, table.columns[chosen], rows, table.note if start == starts[-1] else ""))
    return parts


def cell_words(cell: Cell) -> list[tuple[str, str]]:
    """The lines below a cell's number: (class, text)."""
    lines = [("spread", cell.spread)] if cell.spread else []
    if cell.against:
        lines.append(("against", cell.against + _NOISE[cell.within_noise]))
    if cell.remark:
        lines.append(("remark", cell.remark))
    return lines


def _code(sentence: str) -> Markup:
    """A sentence with what stands in backquotes as code, and all else escaped."""
    parts = [escape(part) for part in sentence.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _run(run: Run, commands: Mapping[str, str]) -> dict[str, Any]:
    guard = run.records.guard
    return {
        "name": run.name,
        "asked": facts.asked(run),
        "description": run.records.recipe.description.strip(),
        "stages": stage_table(run.records),
        "removed": figures.removed(run),
        "lost": bool(removed_kinds(run.records)),
        "kept": "; ".join(kept_of(run.records)),
        "deeds": deeds(run.records),
        "training": figures.training(run),
        "guard": guard,
        "verdict": _VERDICTS[guard.verdict],
        "said": facts.guard(run),
        "loading": facts.loading(run, commands),
        "engines": [(one.engine, one.opens, facts.engine_remark(one)) for one in run.records.engines],
        "command": facts.command(run),
        "yaml": facts.recipe_yaml(run),
        "repeat": facts.repeat(run),
    }


def _summary(comparison: Comparison, results: ModelResults) -> dict[str, Any]:
    """The few numbers that a reader asks for first: (what, number, how it compares)."""
    dense, run = comparison.dense_of(results), comparison.run_of(results)
    lines: list[tuple[str, str, str]] = []
    total = results.value("parameters/total")
    whole = dense.value("parameters/total") if dense else None
    of_dense = f"{100 * total / whole:.1f} % of dense" if total and whole else ""
    lines.append(("parameters", NOT_MEASURED if total is None else written(total, "parameters"), of_dense))
    measured = columns(number for number in results.measurements if number.how == "measured")
    task = task_named(run.records.recipe.task) if run else None
    judged_by = task.metric if task and not task.reads_text else ""
    told = [column for table in QUALITY for column in measured if group(column.name) == table]
    quality = next((column for column in told if column.name == judged_by), told[0] if told else None)
    lines.append(_line(quality, results, dense) if quality else ("quality", NOT_MEASURED, ""))
    speed = next((one for one in measured if one.name.startswith(("decode_speedup/", "frames_speedup"))), None)
    lines.append(
        (speed.title, written(results.value(speed.name) or 0, "1", speed.name), "of dense, measured")
        if speed
        else ("decode speed-up", NOT_MEASURED, "")
    )
    guard = run.records.guard if run else None
    return {
        "name": results.name,
        "model": results.model,
        "done": participle(run.records) if run else "",
        "lines": lines,
        "verdict": guard.verdict if guard else "none",
        "guard": _VERDICTS[guard.verdict] if guard else "not run",
        "remarks": remarks_of(results.measurements),
    }


def _line(column: Column, results: ModelResults, dense: ModelResults | None) -> tuple[str, str, str]:
    number = find(results, column)
    assert number is not None  # the column was made from this model's numbers
    reference = find(dense, column) if dense else None
    suffix = " perplexity" if group(column.name) == "Perplexity" else ""
    beside = ""
    if reference and dense:
        noise = _NOISE[within_noise(number, reference, noise_floor(dense, reference))]
        compared = f"{against(number, reference)}{noise}"
        if not_comparable(results, number.name):
            compared = "not comparable"
        beside = f"dense {written(reference.value, reference.unit, reference.name)}; {compared}"
    return column.title + suffix, written(number.value, number.unit, number.name), beside


def _prompts(models: Sequence[ModelResults]) -> list[tuple[str, list[tuple[str, Sample | None]]]]:
    """Each prompt with what every model wrote that wrote anything."""
    writers = [results for results in models if results.samples]
    prompts = dict.fromkeys(sample.prompt for results in writers for sample in results.samples)
    return [
        (
            prompt,
            [
                (results.name, next((one for one in results.samples if one.prompt == prompt), None))
                for results in writers
            ],
        )
        for prompt in prompts
    ]


def _pictures(models: Sequence[ModelResults]) -> list[tuple[Segmented, list[tuple[str, Segmented | None]]]]:
    """Each picture, with the classes of all models on it, and what each of those says that was asked about pictures."""
    seers = [results for results in models if results.segmented]
    found: list[tuple[Segmented, list[tuple[str, Segmented | None]]]] = []
    for picture in dict.fromkeys(one.picture for results in seers for one in results.segmented):
        said = [(one.name, next((some for some in one.segmented if some.picture == picture), None)) for one in seers]
        first = next(one for _, one in said if one is not None)
        classes = {name: colour for _, one in said if one is not None for name, colour in one.classes.items()}
        found.append((first.model_copy(update={"classes": classes}), said))
    return found


def _protocols(comparison: Comparison) -> list[dict[str, Any]]:
    """How the numbers of each column were made, and where."""
    every = [(results, number) for results in comparison.models for number in results.measurements]
    rows: list[dict[str, Any]] = []
    for column in columns(number for _, number in every):
        mine = [number for _, number in every if column_key(number) == column.key]
        rows.append(
            {
                "title": f"{column.title} ({column.name})",
                "group": group(column.name),
                "how": column.how,
                "settings": ", ".join(f"{key}: {value}" for key, value in column.protocol.items()),
                "seeds": ", ".join(dict.fromkeys(str(number.seed) for number in mine if number.seed is not None))
                or "none drawn",
                "n": ", ".join(dict.fromkeys(f"{number.n:,}" for number in mine if number.n is not None))
                or "not recorded",
                "places": list(dict.fromkeys(facts.place(number.environment) for number in mine)),
            }
        )
    return rows
