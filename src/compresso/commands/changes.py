"""What changed between the dense model and a smaller one, as a table for the terminal."""

from rich.table import Table
from rich.text import Text

from compresso.metrics.record import Change, ModelResults


def changes_table(results: ModelResults) -> Table:
    """A row for each number: dense, smaller, difference with its interval, corrected p, verdict."""
    table = Table(title=f"{results.name} against dense", title_justify="left")
    for title in ("", "dense", "smaller", "difference", "95 %", "p", "n", ""):
        table.add_column(title, justify="left" if not title else "right", overflow="fold")
    for one in results.changes:
        table.add_row(*(Text(cell) for cell in _cells(one)))
    return table


def _cells(one: Change) -> list[str]:
    p = one.p if one.p_adjusted is None else one.p_adjusted
    interval = "" if one.low is None or one.high is None else f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
    return [
        one.name,
        "" if one.dense is None else f"{100 * one.dense:.1f}",
        "" if one.smaller is None else f"{100 * one.smaller:.1f}",
        "" if one.difference is None else f"{100 * one.difference:+.1f}",
        interval,
        "" if p is None else f"{p:.2g}",
        "" if one.n is None else f"{one.n:,}",
        f"{one.verdict}: {one.words}" if one.words else one.verdict,
    ]
