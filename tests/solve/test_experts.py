"""How many experts stay is said where it is not what was asked for."""

import pytest

from compresso.core.axis import Axis, Kind
from compresso.solve.experts import best_of_all, even_counts, said_of_counts


def experts(size: int = 8, needed: int = 2, groups: int = 1) -> list[Axis]:
    names = ("layers.0.experts", "layers.1.experts")
    return [Axis(name, Kind.EXPERT, size, (), (), "", min_units=needed, groups=groups) for name in names]


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 0.875, 1.0])
def test_of_what_is_as_asked_nothing_is_said(keep: float) -> None:
    assert said_of_counts(experts(), keep) == []


def test_a_share_that_takes_none_away_says_which_would() -> None:
    (said,) = said_of_counts(experts(), 0.99)
    assert (
        said == "keep=0.99 takes none of the 8 experts of a layer away; 0.875 is the largest keep that takes some away"
    )
    assert even_counts(experts(), 0.875) == {"layers.0.experts": 7, "layers.1.experts": 7}


def test_groups_that_hold_experts_back_are_named() -> None:
    (said,) = said_of_counts(experts(16, 4, groups=4), 0.6)
    assert said == "8 of 16 experts of a layer stay, not the 10 asked for, as many in each of its router's 4 groups"
    (said,) = said_of_counts(experts(8, 8, groups=4), 0.75)
    assert said == "keep=0.75 takes none of the 8 experts of a layer away, as many in each of its router's 4 groups"


def test_a_router_that_needs_all_of_its_experts_is_no_matter_of_keep() -> None:
    with pytest.raises(ValueError, match=r"among at least 8, so no expert of this router can leave"):
        even_counts(experts(8, 8, groups=4), 0.5)
    with pytest.raises(ValueError, match=r"among at least 4, so keep 0\.5 or more$"):
        even_counts(experts(8, 4), 0.3)
    even_counts(experts(8, 4), 0.5)


def test_a_pool_that_routers_need_more_of_names_the_share_that_they_leave() -> None:
    with pytest.raises(ValueError, match=r"routers choose among 6; keep 0\.375 or more$"):
        best_of_all(experts(8, 3), {}, 0.2)
