"""Measurements of `evaluate` in the terminal: a table of each model, remarks, and what was not measured."""

from rich.console import Console
from rich.table import Table

from compresso.commands.changes import changes_table, changes_words
from compresso.core.counted import counted
from compresso.metrics.record import Measurement, ModelResults, Report
from compresso.metrics.trust.dimensions.fairness import FAIRNESS
from compresso.report.cures import TRAINED_FOR


def show(report: Report, as_json: bool = False) -> None:
    """Print a report as JSON, or as a table with what it does not hold."""
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    console = Console()
    for results in report.models:
        console.print(_scores(results))
        for line in _notes(results):
            console.print(line, highlight=False)
        for line in _shortened(results):
            console.print(line, highlight=False)
        if results.changes:
            console.print(changes_table(results))
            for line in changes_words(results):
                console.print(line, highlight=False, markup=False)
        for what, why in results.not_measured.items():
            console.print(f"{what} not measured: {why}.", highlight=False)
        if absent := _absent(results):
            console.print(f"Not measured: {', '.join(absent)}.")


def _shortened(results: ModelResults) -> list[str]:
    """That a part of the items was asked, and which; nothing where all were."""
    limits = {limit: one.protocol for one in results.measurements if (limit := one.protocol.get("limit"))}
    measured = {one.name for one in results.measurements}
    firsts = [int(limit) for limit, how in limits.items() if how.get("suite") != "trust"]
    told = [f"Only the first {counted(most, 'item')} of each task" for most in sorted(firsts)[-1:]]
    for limit in (limit for limit, how in limits.items() if how.get("suite") == "trust"):
        raised = not isinstance(limit, str) and int(limit) < FAIRNESS.least and f"trust/{FAIRNESS.name}" in measured
        least = f" (fairness at least {FAIRNESS.least})" if raised else ""
        part = limit if isinstance(limit, str) else f"{counted(int(limit), 'question')} of a dimension"
        told.append(f"Only {part}, every kind with its share{least}")
    return [f"{line}: not comparable with published scores." for line in told]


def _scores(results: ModelResults) -> Table:
    """A row for each number; a column that says nothing of any of them is left out."""
    rows = [
        (
            one.name,
            f"{one.value:.3f}",
            "" if one.stderr is None else f"{one.stderr:.3f}",
            f"{one.low:.3f} to {one.high:.3f}" if _has_interval(one) else "",
            "" if one.n is None else f"{one.n:,}",
            "" if (shots := one.protocol.get("shots")) is None else str(shots),
            "" if "prompt" not in one.protocol else "on" if one.protocol["prompt"] else "off",
        )
        for one in results.measurements
    ]
    table = Table(title=f"{results.name} {results.fingerprint[:19]}", title_justify="left")
    said = [place < 2 or any(row[place] for row in rows) for place in range(7)]
    for name, shown in zip(("", "value", "± stderr", "95 %", "n", "shots", "prompt"), said, strict=True):
        if shown:
            left = name in ("", "prompt")
            table.add_column(name, justify="left" if left else "right", no_wrap=bool(name), overflow="fold")
    for row in rows:
        table.add_row(*(cell for cell, shown in zip(row, said, strict=True) if shown))
    return table


def _has_interval(one: Measurement) -> bool:
    """Whether low and high are those of an interval, and not of rounds."""
    return one.low is not None and ("interval" in one.protocol or one.protocol.get("suite") == "trust")


def _notes(results: ModelResults) -> list[str]:
    """Where the rows of tasks came from, and the remarks beside numbers, each once."""
    sources = [
        f"{one.protocol['data']}: {one.protocol['data_remark']}"
        for one in results.measurements
        if one.protocol.get("data_remark")
    ]
    remarks = [f"{one.name}: {one.remark}" for one in results.measurements if one.remark]
    return list(dict.fromkeys([*sources, *remarks]))


def _absent(results: ModelResults) -> list[str]:
    """What `evaluate` can measure and was not asked for, with the option that asks for it."""
    units = {one.unit for one in results.measurements if not one.name.startswith("cache_")}
    if any(
        TRAINED_FOR in one.protocol or one.name.partition("/")[0] in ("refusal", "trust")
        for one in results.measurements
    ):
        return []
    return [
        what
        for unit, what in (("share", "tasks (--suite or --tasks)"), ("1", "perplexity (--corpus)"))
        if unit not in units
    ]
