"""What changed between the dense model and a smaller one, as a table for the terminal: names fold, numbers never, and
what is said in many words stands once below, with the rows that it is said of.
"""

from rich.table import Table
from rich.text import Text

from compresso.metrics.record import Change, ModelResults

_TITLES = ("", "dense", "smaller", "change", "95 %", "p", "n", "")
_NAME = 12


def changes_table(results: ModelResults) -> Table:
    """A row for each number: dense, smaller, difference with its interval, corrected p, verdict; what no row has is
    left out.
    """
    table = Table(title=f"{results.name} against dense", title_justify="left", padding=(0, 0))
    rows = [_cells(one) for one in results.changes]
    said = [place < 3 or any(row[place] for row in rows) for place in range(len(_TITLES))]
    for place, (name, shown) in enumerate(zip(_TITLES, said, strict=True)):
        if shown:
            table.add_column(
                name,
                justify="left" if not name else "right",
                overflow="fold",
                no_wrap=place > 0,
                min_width=_NAME if not place else None,
            )
    for row in rows:
        table.add_row(*(Text(cell) for cell, shown in zip(row, said, strict=True) if shown))
    return table


def changes_words(results: ModelResults) -> list[str]:
    """What is to be read beside the rows, each sentence once, with the rows that it is said of."""
    found: dict[str, list[str]] = {}
    for one in results.changes:
        words = f"{one.verdict}: {one.words}" if one.words else one.verdict
        if one.words or one.verdict in ("not comparable", "not measured"):
            found.setdefault(words, []).append(one.name)
    every = len(results.changes)
    return [f"{'all rows' if len(names) == every > 1 else ', '.join(names)}: {said}" for said, names in found.items()]


def _cells(one: Change) -> list[str]:
    p = one.p if one.p_adjusted is None else one.p_adjusted
    interval = "" if one.low is None or one.high is None else f"{100 * one.low:+.1f}..{100 * one.high:+.1f}"
    return [
        one.name,
        "" if one.dense is None else f"{100 * one.dense:.1f}",
        "" if one.smaller is None else f"{100 * one.smaller:.1f}",
        "" if one.difference is None else f"{100 * one.difference:+.1f}",
        interval,
        "" if p is None else f"{p:.2g}",
        "" if one.n is None else f"{one.n:,}",
        one.verdict,
    ]
