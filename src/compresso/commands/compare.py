"""`compresso compare`: several results side by side, as tables in the terminal and as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from compresso.door import public
from compresso.engines.registry import commands
from compresso.report.html import check_target, write_report
from compresso.report.read import Comparison, read_results
from compresso.report.remarks import remarks_in
from compresso.report.table import Cell, Row, Table, missing, tables

_NAME, _LEAST = 24, 10
"""Widths of the column of names and of a model's narrowest column."""


@public
def compare(paths: Sequence[str | Path], output: str | Path | None = None) -> Comparison:
    """Merge run folders and report files by the models they speak of, and write the page if `output` is given.

    Args:
        paths: folders of runs, and JSON files of `evaluate` and `measure`.
        output: the page, with tables, charts and texts; a report that lies there is replaced.

    Returns:
        The models, dense first; `Comparison.report()` is what a file holds.

    Raises:
        CheckpointError: an input that is no result, is damaged, or has nothing in common with the others; nothing is
            written.
        ExportError: an output that is a folder or not a report.
    """
    if output is not None:
        check_target(output)
    comparison = read_results(paths)
    if output is not None:
        write_report(output, comparison, commands())
    return comparison


def show(comparison: Comparison, as_json: bool) -> None:
    """Print a comparison as JSON (a report) or as tables, one for each group of numbers, with models side by side."""
    if as_json:
        print(comparison.report().model_dump_json(indent=2))
        return
    console = Console()
    for one in tables(comparison):
        for rows in _side_by_side(one.rows, console.width):
            console.print(_drawn(one, rows, console.width))
        for line in remarks_in(one.columns, one.rows):
            console.print(_plain(line, "dim"), soft_wrap=True)
    if absent := missing(comparison):
        console.print(f"Not measured: {', '.join(absent)}.")
    if not comparison.dense:
        console.print("[red]No dense model is among the inputs: give the file of `compresso evaluate` on it too.[/red]")


def _side_by_side(rows: Sequence[Row], width: int) -> list[list[Row]]:
    """The models that fit beside each other; the first, which others are held against, stands in each part."""
    room = max(1, (width - _NAME - 3) // (_LEAST + 3) - 1)
    first, others = rows[:1], rows[1:]
    return [[*first, *others[i : i + room]] for i in range(0, max(len(others), 1), room)]


def _drawn(table: Table, rows: Sequence[Row], width: int) -> Drawn:
    """Numbers in rows, models in columns; numbers that most of them have come first."""
    drawn = Drawn(title=table.title, title_justify="left", show_lines=True)
    drawn.add_column("", max_width=_NAME, overflow="fold")
    for row in rows:
        drawn.add_column(_plain(row.name, "bold" if row.kind == "dense" else ""), justify="right", overflow="fold")
    for place, column in enumerate(table.columns):
        heading = _plain(column.title) + Text(f"\n{column.how}", style="dim")
        if column.detail:
            heading += _plain(f"\n{_short(column.detail)}", "dim")
        drawn.add_row(heading, *(_cell(row.cells[place]) for row in rows))
    return drawn


def _short(detail: str) -> str:
    """A protocol without the checksums, which tell it apart and tell a person nothing."""
    return ", ".join(part for part in detail.split(", ") if "sha256" not in part)


def _cell(cell: Cell) -> Text:
    text = _plain(cell.text, "" if cell.present else "dim")
    if cell.against:
        known = {True: "\nwithin noise", False: "", None: ""}[cell.within_noise]
        text += Text(f"\n{cell.against}{known}", style="dim")
    return text


def _plain(text: str, style: str = "") -> Text:
    """Text from outside: no markup is read from it, and control characters, which could steer the terminal, are shown
    as '?'.
    """
    return Text("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text), style=style)
