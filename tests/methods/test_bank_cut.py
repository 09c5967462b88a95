"""What methods that search a bank share: rows that are set apart, and jobs that none of them takes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.core.row import Row
from compresso.errors import DataError, ResourceError
from compresso.methods.bank_cut import places_apart, refuse_apart, unseen
from tests.methods.conftest import MakeJob


@given(n=st.integers(3, 40), most=st.lists(st.integers(0, 30), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_every_row_is_in_one_set(n: int, most: list[int], seed: int) -> None:
    rows: list[Row] = [{"input_ids": [i], "labels": [i]} for i in range(n)]
    sets = places_apart(rows, most, seed)
    assert sorted(place for of in sets for place in of) == list(range(n))
    assert unseen(rows, *sets[1:]) == {"of": n, "places": sorted(set(range(n)) - set(sets[0]))}
    assert [len(of) for of in sets[1:]] == [min(one, n // 3) for one in most] and len(sets[0]) >= n - 2 * (n // 3)
    assert sets == places_apart(rows, most, seed)


def test_another_seed_draws_others() -> None:
    rows: list[Row] = [{"input_ids": [i], "labels": [i]} for i in range(40)]
    assert places_apart(rows, [10], 0) != places_apart(rows, [10], 1)


def test_two_rows_are_too_few() -> None:
    with pytest.raises(DataError, match=r"2 calibration examples.*give at least 3"):
        places_apart([{"input_ids": [1], "labels": [1]}] * 2, [1], 0)


def test_the_model_is_in_memory(make_job: MakeJob) -> None:
    job = make_job()
    refuse_apart(job, "ristretto")
    with pytest.raises(ResourceError, match=r"'ristretto'.*without --offload"):
        refuse_apart(replace(job, offloaded=object()), "ristretto")  # type: ignore[arg-type]
