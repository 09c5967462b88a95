"""Every part of a dimension has a question where the limit leaves room, and what has none is named."""

from pathlib import Path

import pytest

from compresso.metrics.record import Environment
from compresso.metrics.trust.dimensions import DIMENSIONS
from compresso.metrics.trust.questions import Extent, questions_of
from compresso.metrics.trust.strata import stratified
from compresso.metrics.trust.suite import answered, trust_changes, trust_measurements
from tests.metrics.trust.made_up import data
from tests.metrics.trust.scripted import Scripted

STRATA = [("big", i % 7) for i in range(900)] + [("small", i % 5) for i in range(26)] + [("least", 0)] * 2
PARTS = [part for part, _ in STRATA]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [3, 4, 40, 0.01])
def test_each_part_has_one(limit: int | float, seed: int) -> None:
    kept = stratified(STRATA, limit, seed, PARTS)
    assert {PARTS[i] for i in kept} == set(PARTS)
    assert len(kept) == len(set(kept)) == (limit if isinstance(limit, int) else 9)


@pytest.mark.parametrize("limit", [1, 2, 300, None])
def test_where_there_is_no_room_or_no_need_the_draw_is_as_it_was(limit: int | None) -> None:
    assert stratified(STRATA, limit, 1, PARTS) == stratified(STRATA, limit, 1)


def test_parts_without_a_question_are_named(tmp_path: Path) -> None:
    (stereotype,) = [one for one in DIMENSIONS if one.name == "stereotype"]
    read, model = data(tmp_path), Scripted(lambda _: "yes")

    def found(limit: int):  # type: ignore[no-untyped-def]
        return answered(model, questions_of(read, Extent(limit=limit), dimensions=[stereotype]))

    (_, few), (_, enough) = found(1), found(8)
    assert len(few.unasked) == 1 and enough.unasked == ()
    numbers, _ = trust_measurements([few], Environment.here(), Extent(limit=1))
    assert f"no question of {few.unasked[0]} was answered" in (numbers[0].remark or "")
    (change,) = trust_changes([few], [few])
    assert f"no question of {few.unasked[0]} was asked" in change.words
