"""Tables of a comparison: models in rows, the dense one first, one protocol a column; what was not measured is said in
words.

A difference from dense is within noise if it is no larger than the noise floor (dense against itself), or than two
standard errors of the difference, or if the ranges over rounds overlap. Standard errors treat the two models' answers
as independent; on the same items they are not, so the true error is smaller and a difference beyond it is real.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compresso.metrics.record import Measurement, ModelResults
from compresso.report.columns import (
    GROUPS,
    NOISE,
    QUALITY,
    Column,
    column_key,
    columns,
    group,
    is_against_dense,
    written,
    written_range,
)
from compresso.report.read import Comparison

NOT_MEASURED = "not measured"
REFERENCE = "reference"
NOISE_ROW = "noise floor"

_OF_SOME = ("Tasks: F1", "Tasks: intersection over union", "Trust", "Other")
"""Groups that most models have no number of, and lack nothing."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: the number in its unit, or why there is none.
        spread: range over rounds; may be empty.
        against: how it compares with dense; may be empty.
        within_noise: whether that difference is noise; None where nobody knows.
        remark: what must be read beside the number.
        present: whether there is a number.
    """

    text: str
    spread: str = ""
    against: str = ""
    within_noise: bool | None = None
    remark: str = ""
    present: bool = True


@dataclass(frozen=True)
class Row:
    """One model's cells. `kind` is "dense", "pruned" or "noise"."""

    name: str
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A group of columns; `note` says what no cell has room for."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


def tables(comparison: Comparison) -> list[Table]:
    """One table for each group of numbers that somebody has."""
    every = columns(number for results in comparison.models for number in results.measurements)
    made: list[Table] = []
    for name in GROUPS:
        mine = tuple(sorted((column for column in every if group(column.name) == name), key=_lacking(comparison)))
        if mine:
            rows = _rows(comparison, mine)
            floor = _floors(comparison, mine) if name in QUALITY else None
            if floor is not None:
                rows.insert(len(comparison.dense), floor)
            untold = (
                name in QUALITY
                and floor is None
                and bool(comparison.dense)
                and not all(is_against_dense(one.name) for one in mine)
            )
            made.append(Table(name, mine, tuple(rows), "Noise floor: not measured." if untold else ""))
    return made


def _lacking(comparison: Comparison) -> Callable[[Column], int]:
    """How many models have no number in a column: what can be compared across all comes first."""
    return lambda column: sum(find(one, column) is None for one in comparison.models)


def missing(comparison: Comparison) -> list[str]:
    """The groups in which no model has a number, and what single models lack, with the reason."""
    have = {group(number.name) for results in comparison.models for number in results.measurements}
    absent = [name for name in GROUPS if name not in have and name not in _OF_SOME]
    return absent + [
        f"{what} of {one.name}: {why}" for one in comparison.models for what, why in one.not_measured.items()
    ]


def find(results: ModelResults, column: Column) -> Measurement | None:
    """A model's number in a column."""
    return next((number for number in results.measurements if column_key(number) == column.key), None)


def noise_floor(dense: ModelResults, number: Measurement) -> Measurement | None:
    """How far the dense model lies from itself in a number: one named "noise/<name>" whose protocol contradicts the
    number's nowhere.
    """
    for one in dense.measurements:
        if one.name == NOISE + number.name and one.unit == number.unit:
            shared = one.protocol.keys() & number.protocol.keys()
            if all(one.protocol[key] == number.protocol[key] for key in shared):
                return one
    return None


def within_noise(number: Measurement, dense: Measurement, floor: Measurement | None) -> bool | None:
    """Whether a difference from dense is no more than noise; None where neither a floor, standard errors nor ranges are
    known.
    """
    difference = abs(number.value - dense.value)
    known: list[bool] = []
    if floor is not None:
        known.append(difference <= floor.value)
    if number.stderr is not None and dense.stderr is not None:
        known.append(difference <= 2 * math.hypot(number.stderr, dense.stderr))
    if number.low is not None and number.high is not None and dense.low is not None and dense.high is not None:
        known.append(number.low <= dense.high and dense.low <= number.high)
    return any(known) if known else None


def against(number: Measurement, dense: Measurement) -> str:
    """A difference from dense in words: a share of it where that is the question, else points or percent."""
    if is_against_dense(number.name):
        return ""
    if number.unit == "share":
        return f"{100 * (number.value - dense.value):+.1f} points".replace("-", "\u2212")
    if dense.value == 0:
        return ""
    ratio = number.value / dense.value
    if group(number.name) in ("Size", "Memory"):
        return f"{100 * ratio:.1f} % of dense"
    return f"{ratio:.2f} × dense" if number.unit == "tokens/s" else f"{100 * (ratio - 1):+.1f} %".replace("-", "\u2212")


def _rows(comparison: Comparison, mine: Sequence[Column]) -> list[Row]:
    dense = [results for results in comparison.models if results.fingerprint in comparison.dense]
    rows: list[Row] = []
    if not dense:
        rows.append(Row("dense", "dense", tuple(Cell(NOT_MEASURED, present=False) for _ in mine)))
    rows += [Row(one.name, "dense", tuple(_cell(one, None, column, REFERENCE) for column in mine)) for one in dense]
    pruned = [results for results in comparison.models if results.fingerprint not in comparison.dense]
    rows += [
        Row(one.name, "pruned", tuple(_cell(one, comparison.dense_of(one), column, NOT_MEASURED) for column in mine))
        for one in pruned
    ]
    return rows


def _cell(results: ModelResults, dense: ModelResults | None, column: Column, relative: str) -> Cell:
    """A model's cell; `relative` stands where it lacks a number that relates a model to the dense one."""
    number = find(results, column)
    if number is None:
        return Cell(relative if is_against_dense(column.name) else NOT_MEASURED, present=False)
    text = written(number.value, number.unit, number.name, number.stderr)
    spread = ""
    if number.low is not None and number.high is not None:
        spread = written_range(number.low, number.high, number.unit, number.name)
    reference = find(dense, column) if dense is not None else None
    if dense is None or reference is None:
        return Cell(text, spread, remark=number.remark or "")
    if why := not_comparable(results, number.name):
        return Cell(
            text, spread, "not comparable", remark="; ".join(filter(None, (f"not comparable: {why}", number.remark)))
        )
    verdict = within_noise(number, reference, noise_floor(dense, reference)) if number.how == "measured" else None
    paired = number.name.replace("/", "_speedup/", 1)  # measured in turn with dense, so the better of the two ratios
    twice = number.unit == "tokens/s" and any(one.name == paired for one in results.measurements)
    return Cell(text, spread, "" if twice else against(number, reference), verdict, number.remark or "")


def not_comparable(results: ModelResults, name: str) -> str:
    """Why a number, or the score that it belongs to, does not compare with the dense model's: a broken model is no
    better for what it does not say; "" where it does.
    """
    changes = [one for one in results.changes if name == one.name or name.startswith(f"{one.name}/")]
    return next((one.words or one.verdict for one in reversed(changes) if one.verdict == "not comparable"), "")


def _floors(comparison: Comparison, mine: Sequence[Column]) -> Row | None:
    """The row of noise floors; None where no number has one."""
    dense = [results for results in comparison.models if results.fingerprint in comparison.dense]
    cells: list[Cell] = []
    for column in mine:
        number = next((one for results in dense if (one := find(results, column)) is not None), None)
        floor = next(
            (one for results in dense if number is not None and (one := noise_floor(results, number)) is not None), None
        )
        if floor is None:
            cells.append(Cell(REFERENCE if is_against_dense(column.name) else NOT_MEASURED, present=False))
        else:
            cells.append(
                Cell(
                    "± " + written(float(f"{floor.value:.2g}"), floor.unit, floor.name),
                    spread=str(floor.protocol.get("noise", "")),
                )
            )
    return Row(NOISE_ROW, "noise", tuple(cells)) if any(cell.present for cell in cells) else None
