"""Remarks beside numbers, as sentences away from these: each once, with the numbers and models that it is about."""

from collections.abc import Iterable, Sequence

from compresso.metrics.record import Measurement
from compresso.report.columns import Column, title
from compresso.report.table import Row
from compresso.report.trust_rows import title as dimension


def remarks_of(numbers: Iterable[Measurement]) -> list[str]:
    """Those beside the numbers of one model: "toxicity: scored by x"."""
    found: dict[str, list[str]] = {}
    for number in numbers:
        if number.remark:
            _add(found, number.remark, called(number.name))
    return [f"{'; '.join(names)}: {remark}" for remark, names in found.items()]


def remarks_in(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Those in a table of models: "a, b (toxicity): scored by x"."""
    models: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for row in rows:
        for column, cell in zip(columns, row.cells, strict=True):
            if cell.remark:
                _add(models, cell.remark, row.name)
                _add(names, cell.remark, called(column.name))
    return [f"{', '.join(models[remark])} ({'; '.join(names[remark])}): {remark}" for remark in models]


def called(name: str) -> str:
    """A number's name in a sentence.

    >>> called("trust/out_of_distribution"), called("decode_speedup/batch8")
    ('out of distribution', 'decode speed-up, batch 8')
    """
    return dimension(name) if name.startswith("trust/") else title(name)


def _add(found: dict[str, list[str]], remark: str, name: str) -> None:
    names = found.setdefault(remark, [])
    if name not in names:
        names.append(name)
