"""Budgets refuse what makes no sense, naming the value and the cure."""

import math
from typing import Any

import pytest

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "keep=0 is not a share of the model; give a number above 0 and at most 1"),
        ({"keep": 1.5}, r"keep=1\.5"),
        ({"keep": -0.5}, r"keep=-0\.5"),
        ({"keep": math.nan}, "keep=nan"),
        ({"keep": 0.5, "of": "watts"}, "of='watts' is not counted; give one of blocks, total, macs"),
        ({"keep": 0.5, "kinds": ()}, "kinds is empty"),
        ({"keep": 0.5, "kinds": ("heads",)}, "kinds names 'heads', which is not a kind of unit; the kinds are head"),
        ({"keep": 0.5, "uniform_over": ("ffn",)}, "uniform_over names 'ffn'"),
        ({"keep": 0.5, "multiple_of": {"channel": 0}}, r"multiple_of\['channel'\]=0"),
        ({"keep": 0.5, "multiple_of": {"channel": 2.5}}, r"multiple_of\['channel'\]=2\.5"),
        ({"keep": 0.5, "floor": {"head": -1}}, r"floor\['head'\]=-1"),
        ({"keep": 0.5, "floor": {"haed": 1}}, "floor names 'haed'"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_kinds_may_be_given_by_name() -> None:
    by_name: Any = {
        "kinds": ["head", "hidden"],
        "uniform_over": ["head"],
        "multiple_of": {"hidden": 64},
        "floor": {"head": 2},
    }
    assert Budget(0.5, **by_name) == Budget(
        0.5,
        kinds=(Kind.HEAD, Kind.HIDDEN),
        uniform_over=(Kind.HEAD,),
        multiple_of={Kind.HIDDEN: 64},
        floor={Kind.HEAD: 2},
    )


def test_the_limit_is_whole_and_not_one_short(tiny: CostModel) -> None:
    dense = int(tiny().blocks)
    for count in range(1, dense + 1, 7):
        assert Budget(count / dense).limit(tiny) == count
    assert Budget(1).limit(tiny) == dense
    assert Budget(0.5, of="total").limit(tiny) == int(tiny().total) // 2
    assert Budget(0.5, of="macs").limit(tiny) == int(tiny().macs) // 2


def test_allowed_counts_are_multiples_above_the_floor_or_everything() -> None:
    budget = Budget(0.5, multiple_of={Kind.CHANNEL: 8})
    assert budget.allowed(Kind.CHANNEL, 24) == [0, 8, 16, 24]
    assert budget.allowed(Kind.CHANNEL, 20, fewest=9) == [16, 20]
    assert budget.allowed(Kind.CHANNEL, 5, fewest=1) == [5]
    assert budget.allowed(Kind.HEAD, 3, fewest=1) == [1, 2, 3]


def test_the_floor_is_the_strictest_that_the_axis_can_meet() -> None:
    budget = Budget(0.5, floor={Kind.HEAD: 2})
    assert budget.fewest(Axis("a", Kind.HEAD, 4, (), (), "")) == 2
    assert budget.fewest(Axis("a", Kind.HEAD, 4, (), (), "", min_units=3)) == 3
    assert budget.fewest(Axis("a", Kind.HEAD, 1, (), (), "")) == 1
    assert budget.fewest(Axis("a", Kind.HIDDEN, 4, (), (), "")) == 1


def test_a_floor_may_follow_the_budgets_share() -> None:
    axis = Axis("a", Kind.HEAD, 4, (), (), "")
    assert [Budget(keep, floor={Kind.HEAD: "keep"}).fewest(axis) for keep in (1, 0.75, 0.7, 0.5, 0.3, 0.01)] == [
        4,
        3,
        3,
        2,
        1,
        0,
    ]
    with pytest.raises(ValueError, match=r"floor\['head'\]=half"):
        Budget(0.5, floor={"head": "half"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"multiple_of\['head'\]=keep"):
        Budget(0.5, multiple_of={"head": "keep"})  # type: ignore[dict-item]
