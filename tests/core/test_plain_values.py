"""Numbers that mean a whole one are taken, and a value is shown so that its type can be told."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.core.plain_values import shown, whole_number
from compresso.errors import DataError, RecipeError
from compresso.metrics.trust.dimensions.robustness import _attacks
from compresso.runner.measured_budget import measures_of

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(PLAIN)
def test_a_whole_number_is_what_equals_one_and_says_so(value: Any) -> None:
    found = whole_number(value)
    assert found is None or (type(found) is int and found == value and not isinstance(value, bool))
    assert (found is None) == (isinstance(value, bool | str | None) or value % 1 != 0)


@given(st.integers(-(2**53), 2**53))
def test_a_float_that_equals_a_whole_number_is_it(n: int) -> None:
    assert whole_number(float(n)) == whole_number(n) == n


@given(PLAIN, PLAIN)
def test_two_types_are_never_shown_alike(one: Any, other: Any) -> None:
    if type(one) is not type(other):
        assert shown(one) != shown(other)
    assert len(shown(one)) <= 40 and shown(one).isprintable()
    assert (shown(str(one))[0] in "'\"") and (isinstance(one, str) or shown(one)[0] not in "'\"")


@pytest.mark.parametrize("context", [512, 512.0])
def test_a_recipe_may_write_its_context_as_a_float(context: float) -> None:
    found = measures_of({"context": context}, "recipe mine: cost").context
    assert found == 512 and type(found) is int


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({"context": 0.5}, "context 0.5: wanted a whole number of tokens"),
        ({"context": "512"}, "context '512': wanted a whole number of tokens"),
        ({"context": True}, "context True: wanted a whole number of tokens"),
        ({"context": 8, "weight_bytes": True}, "wanted numbers above 0"),
    ],
)
def test_other_contexts_are_refused(cost: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        measures_of(cost, "recipe mine: cost")


def test_labels_of_a_benchmark_file_may_be_floats(tmp_path: Path) -> None:
    path = tmp_path / "advglue.json"
    path.write_text('{"sst2": [{"sentence": "fine", "label": 1.0}]}')
    (one,) = _attacks(path)
    assert one.right == 1 and type(one.right) is int
    for label in ("true", "2", "0.5"):
        path.write_text(f'{{"sst2": [{{"sentence": "fine", "label": {label}}}]}}')
        with pytest.raises(DataError, match=f"sst2, row 1: label is {label}; wanted 0 or 1"):
            _attacks(path)
