"""What may share a column, and how numbers are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.metrics.record import Measurement
from compresso.report.columns import column_key, columns, group, is_against_dense, lower_is_better, title, written
from tests.report.made import ROUNDS, number

HOWS = st.sampled_from(["measured", "counted", "estimated"])
NAMES = st.sampled_from(["wikitext2/perplexity", "piqa/acc", "kl", "decode/batch1", "parameters/total"])
PROTOCOLS = st.fixed_dictionaries({"seq_len": st.integers(1, 2), "split": st.sampled_from(["test", None])})
NUMBERS = st.builds(
    lambda name, how, protocol, value: number(name, value, how=how, protocol=protocol),
    NAMES,
    HOWS,
    PROTOCOLS,
    st.floats(0, 9),
)


@given(NUMBERS, NUMBERS)
def test_on_one_machine_columns_are_protocols(one: Measurement, other: Measurement) -> None:
    assert (column_key(one) == column_key(other)) == one.same_protocol(other)


@given(st.lists(NUMBERS, max_size=8))
def test_a_column_has_one_kind_and_one_protocol_and_a_heading_of_its_own(some: list[Measurement]) -> None:
    drawn = columns(some)
    for column in drawn:
        mine = [one for one in some if column_key(one) == column.key]
        assert {(one.name, one.unit, one.how) for one in mine} == {(column.name, column.unit, column.how)}
        assert all(one.protocol == column.protocol for one in mine)
    headings = [(column.title, column.how, column.detail) for column in drawn]
    assert len(set(headings)) == len(headings)
    assert {column.key for column in drawn} == {column_key(one) for one in some}


def test_clocks_of_two_machines_stand_apart_and_perplexities_do_not() -> None:
    here, there = (number("decode/batch1", 9, "tokens/s", protocol=ROUNDS, hardware=name) for name in ("one", "two"))
    assert column_key(here) != column_key(there)
    assert "one" in columns([here, there])[0].detail
    here, there = (number("wikitext2/perplexity", 9, hardware=name) for name in ("one", "two"))
    assert column_key(here) == column_key(there)


def test_the_heading_names_the_settings_that_differ_and_no_others() -> None:
    short, long = (number("c4/perplexity", 9, protocol={"split": "test", "seq_len": n}) for n in (128, 2048))
    assert [column.detail for column in columns([short, long])] == ["seq_len=128", "seq_len=2048"]
    assert [column.detail for column in columns([short])] == [""]


def test_noise_floors_get_no_column() -> None:
    assert columns([number("noise/piqa/acc", 0.01, "share")]) == []


@pytest.mark.parametrize(
    ("name", "table", "lower", "relative"),
    [
        ("parameters/total", "Size", True, False),
        ("c4/byte_perplexity", "Perplexity", True, False),
        ("klue/acc", "Tasks: accuracy", False, False),
        ("decode_tasks/acc_norm", "Tasks: accuracy by length-normalised likelihood", False, False),
        ("kl", "Distance from the dense model", True, True),
        ("top1_agreement", "Distance from the dense model", False, True),
        ("degenerate", "Generated text", True, False),
        ("decode/batch8", "Speed", False, False),
        ("decode_bound/batch8", "Speed", False, True),
        ("memory/peak", "Memory", True, False),
        ("held/miou", "Tasks: intersection over union", False, False),
        ("held/iou/car/miou", "Tasks: intersection over union", False, False),
        ("held/pixel-acc", "Tasks: accuracy", False, False),
        ("frames", "Speed", False, False),
        ("frames_speedup", "Speed", False, True),
        ("something/new", "Other", None, False),
    ],
)
def test_names_of_the_contract_have_a_place_and_a_direction(
    name: str, table: str, lower: bool | None, relative: bool
) -> None:
    assert (group(name), lower_is_better(name), is_against_dense(name)) == (table, lower, relative)
    assert title(name)


@pytest.mark.parametrize(
    ("value", "unit", "name", "error", "text"),
    [
        (0.5, "share", "", None, "50.0 %"),
        (0.6123, "share", "", 0.0112, "61.2 ± 1.1 %"),
        (12.3456, "1", "c4/perplexity", 0.052, "12.346 ± 0.052"),
        (12.3456, "1", "c4/perplexity", None, "12.35"),
        (4.0, "1", "", 0.0, "4.000"),
        (6_738_415_616, "parameters", "", None, "6.738 B"),
        (191_872, "parameters", "", None, "191,872"),
        (1e15, "bytes", "", None, "1000 TB"),
        (999, "bytes", "", None, "999 B"),
        (1.5, "1", "decode_speedup/batch1", None, "1.50 ×"),
        (3.14159, "tokens/s", "", None, "3.14 tokens/s"),
        (0.25, "nats/token", "kl", 0.01, "0.250 ± 0.010 nats/token"),
    ],
)
def test_numbers_are_written_with_two_digits_of_their_error(
    value: float, unit: str, name: str, error: float | None, text: str
) -> None:
    assert written(value, unit, name, error) == text
