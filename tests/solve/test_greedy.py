"""Filling by runs against trying every item in turn."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresso.core.axis import Axis, Kind
from compresso.solve.greedy import Flat, Items, admit_greedily


@settings(deadline=None, max_examples=200)
@given(
    prices=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    groups=st.lists(st.integers(0, 3), max_size=30),
    capacity=st.integers(0, 60),
    first=st.sets(st.integers(0, 29)),
)
def test_runs_admit_what_trying_each_item_admits(
    prices: list[int], groups: list[int], capacity: int, first: set[int]
) -> None:
    """Items of one group have one price here; the price of group 0 grows with what group 1 has, as heads and hidden
    dimensions do.
    """
    group = torch.tensor([g % len(prices) for g in groups], dtype=torch.long)

    def price(admitted: torch.Tensor) -> int:
        n = [int((admitted & (group == g)).sum()) for g in range(4)]
        return sum(p * n[g] for g, p in enumerate(prices)) + n[0] * n[1]

    given_items = torch.tensor([i in first for i in range(len(group))], dtype=torch.bool)
    if price(given_items) > capacity:
        given_items = torch.zeros_like(given_items)
    expected = given_items.clone()
    for i in range(len(group)):
        trial = expected.clone()
        trial[i] = True
        expected = trial if price(trial) <= capacity else expected
    for closing in (True, False):
        items = Items(torch.arange(len(group)), group, torch.full((len(group),), closing))
        assert torch.equal(admit_greedily(items, lambda trial: price(trial) <= capacity, given_items), expected)


def test_units_of_no_item_stay_as_they_started() -> None:
    items = Items(torch.tensor([-1, 0, 0, -1, 1]), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    start = torch.tensor([True, False, False, False, False])
    assert items.units(torch.tensor([True, False]), start).tolist() == [True, True, True, False, False]
    assert items.next_of_groups(torch.tensor([True, False])) == [1]
    assert items.next_of_groups(torch.tensor([True, True])) == []


def test_axes_are_laid_end_to_end_and_back() -> None:
    flat = Flat(
        [
            Axis("a", Kind.HEAD, 2, (), (), ""),
            Axis("empty", Kind.HEAD, 0, (), (), ""),
            Axis("b", Kind.CHANNEL, 3, (), (), ""),
        ]
    )
    values = {"b": torch.tensor([3.0, 4.0, 5.0]), "a": torch.tensor([1.0, 2.0]), "empty": torch.zeros(0)}
    joined = flat.join(values)
    assert joined.tolist() == [1, 2, 3, 4, 5] and joined.dtype == torch.float64
    assert {name: part.tolist() for name, part in flat.split(joined).items()} == {
        "a": [1, 2],
        "empty": [],
        "b": [3, 4, 5],
    }
