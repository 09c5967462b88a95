"""`compresso compare`: several results side by side, as tables in the terminal and as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compresso.door import public
from compresso.engines.registry import commands
from compresso.report.html import check_target, write_report
from compresso.report.read import Comparison, read_results
from compresso.report.table import Cell, missing, tables


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
    """Print a comparison as JSON (a report) or as tables, one for each group of numbers."""
    if as_json:
        print(comparison.report().model_dump_json(indent=2))
        return
    console = Console()
    for one in tables(comparison):
        drawn = Table(title=one.title, title_justify="left")
        drawn.add_column("model", overflow="fold")
        for column in one.columns:
            heading = _plain(column.title) + Text(f"\n{column.how}", style="dim")
            if column.detail:
                heading += _plain(f"\n{column.detail}", "dim")
            drawn.add_column(heading, justify="right", overflow="fold")
        for row in one.rows:
            drawn.add_row(_plain(row.name, "bold" if row.kind == "dense" else ""), *(_cell(cell) for cell in row.cells))
        console.print(drawn)
    if absent := missing(comparison):
        console.print(f"Not measured: {', '.join(absent)}.")
    if not comparison.dense:
        console.print("[red]No dense model is among the inputs: give the file of `compresso evaluate` on it too.[/red]")


def _cell(cell: Cell) -> Text:
    text = _plain(cell.text, "" if cell.present else "dim")
    if cell.against:
        known = {True: "\nwithin noise", False: "", None: ""}[cell.within_noise]
        text += Text(f"\n{cell.against}{known}", style="dim")
    if cell.remark:
        text += _plain(f"\n{cell.remark}", "red")
    return text


def _plain(text: str, style: str = "") -> Text:
    """Text from outside: no markup is read from it, and control characters, which could steer the terminal, are shown
    as '?'.
    """
    return Text("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text), style=style)
