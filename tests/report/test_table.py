"""Tables: who stands where, what is said of absent numbers, and what counts as noise."""

from pathlib import Path

import pytest

from compresso.report.columns import NOISE, column_key
from compresso.report.read import read_results
from compresso.report.table import NOT_MEASURED, REFERENCE, Table, against, missing, noise_floor, tables, within_noise
from tests.report.made import SMALLER, TASK, TEXT, dense, number, pruned, report_file


def drawn(folder: Path, *models) -> dict[str, Table]:  # type: ignore[no-untyped-def]
    return {table.title: table for table in tables(read_results([report_file(folder / "all.json", *models)]))}


def test_dense_stands_first_and_rows_have_a_cell_for_each_column(tmp_path: Path) -> None:
    made = drawn(tmp_path, dense(), pruned(), pruned("other", SMALLER))
    assert len(made) == 5
    for table in made.values():
        assert [row.name for row in table.rows] == ["dense", "compresso", "other"]
        assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    made = drawn(tmp_path, dense(number("c4/perplexity", 5)), pruned())
    c4 = next(i for i, column in enumerate(made["Perplexity"].columns) if column.name == "c4/perplexity")
    cell = made["Perplexity"].rows[-1].cells[c4]
    assert (cell.text, cell.present) == (NOT_MEASURED, False)
    relative = made["Distance from the dense model"]
    assert relative.rows[0].cells[0].text == REFERENCE
    assert all(cell.text for table in made.values() for row in table.rows for cell in row.cells)
    assert missing(read_results([tmp_path / "all.json"])) == [
        "Tasks: accuracy by length-normalised likelihood",
        "Tasks: exact match",
        "Generated text",
        "Memory",
    ]


def test_without_a_dense_model_its_row_says_so(tmp_path: Path) -> None:
    made = drawn(tmp_path, pruned())
    assert {(table.rows[0].name, cell.text) for table in made.values() for cell in table.rows[0].cells} == {
        ("dense", NOT_MEASURED)
    }
    assert all(cell.against == "" for table in made.values() for cell in table.rows[1].cells)
    assert made["Distance from the dense model"].rows[1].cells[0].text.startswith("0.250")


def test_a_remark_stays_with_its_number(tmp_path: Path) -> None:
    speed = drawn(tmp_path, dense(), pruned(remark="no speed-up: zeros are stored dense"))["Speed"]
    told = [
        (column.name, cell.remark)
        for column, cell in zip(speed.columns, speed.rows[1].cells, strict=True)
        if cell.remark
    ]
    assert told == [("decode_speedup/batch1", "no speed-up: zeros are stored dense")]


@pytest.mark.parametrize(("difference", "floor", "expected"), [(0.1, 0.1, True), (0.11, 0.1, False), (0.1, None, None)])
def test_a_floor_decides(difference: float, floor: float | None, expected: bool | None) -> None:
    base = number("c4/perplexity", 0.0)
    noise = None if floor is None else number("noise/c4/perplexity", floor)
    assert within_noise(number("c4/perplexity", difference), base, noise) is expected
    assert within_noise(number("c4/perplexity", -difference), base, noise) is expected


def test_two_standard_errors_of_the_difference_are_noise() -> None:
    base = number("piqa/acc", 0.6, "share", stderr=0.03)
    for offset, expected in ((0.0999, True), (0.1001, False)):  # 2 sqrt(.03^2 + .04^2) = .1
        assert within_noise(number("piqa/acc", 0.6 - offset, "share", stderr=0.04), base, None) is expected
    assert within_noise(number("piqa/acc", 0.59, "share", stderr=0.04), number("piqa/acc", 0.6, "share"), None) is None


def test_overlapping_rounds_are_noise() -> None:
    base = number("decode/batch1", 100, "tokens/s", low=95, high=105)
    assert within_noise(number("decode/batch1", 110, "tokens/s", low=104, high=120), base, None) is True
    assert within_noise(number("decode/batch1", 110, "tokens/s", low=106, high=120), base, None) is False


def test_a_floor_belongs_to_its_number_and_protocol(tmp_path: Path) -> None:
    floor = number(f"{NOISE}wikitext2/perplexity", 0.3, protocol={**TEXT, "noise": "half-split"})
    strange = number(f"{NOISE}piqa/acc", 0.1, "share", protocol={**TASK, "shots": 5, "noise": "other seed"})
    base = dense(floor, strange)
    assert noise_floor(base, base.measurements[2]) == floor
    assert noise_floor(base, base.measurements[3]) is None
    made = drawn(tmp_path, base, pruned(perplexity=10.2))
    assert [row.kind for row in made["Perplexity"].rows] == ["dense", "noise", "pruned"]
    assert made["Perplexity"].rows[1].cells[0].text == "± 0.3"
    assert made["Perplexity"].rows[1].cells[0].spread == "half-split"
    assert made["Perplexity"].rows[2].cells[0].within_noise is True
    assert made["Tasks: accuracy"].note == "Noise floor: not measured."
    assert not any(column_key(strange) == column.key for table in made.values() for column in table.columns)


def test_differences_are_worded_by_what_the_number_is() -> None:
    def pair(name: str, unit: str, old: float, new: float) -> str:
        return against(number(name, new, unit), number(name, old, unit))

    assert pair("piqa/acc", "share", 0.6, 0.55) == "\u22125.0 points"
    assert pair("c4/perplexity", "1", 10, 12) == "+20.0 %"
    assert pair("parameters/total", "parameters", 1000, 700) == "70.0 % of dense"
    assert pair("decode/batch1", "tokens/s", 100, 127) == "1.27 × dense"
    assert pair("decode_speedup/batch1", "1", 1, 1.3) == ""
    assert pair("repetition", "share", 0, 0.5) == "+50.0 points"
    assert pair("x", "1", 0, 1) == ""
