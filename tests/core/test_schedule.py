"""Ramps against their closed forms, learning rates against transformers' own schedules."""

import pytest
import torch
from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from compresso.core.schedule import (
    Schedule,
    constant,
    cosine,
    linear,
    progress,
    rate,
    rate_for_width,
)


def factors_of(make: object, warmup: int, total: int) -> list[float]:
    """The factors that a transformers schedule gives for updates 0 to total."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=total)  # type: ignore[operator]
    rates: list[float] = []
    for _ in range(total + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(linear, get_linear_schedule_with_warmup), (cosine, get_cosine_schedule_with_warmup)]
)
def test_rates_equal_those_of_transformers(ours: object, theirs: object, warmup: int) -> None:
    schedule: Schedule = ours(11, warmup)  # type: ignore[operator]
    assert [schedule(k) for k in range(12)] == pytest.approx(factors_of(theirs, warmup, 11), abs=1e-12)


def test_rates_past_the_end_stay() -> None:
    assert linear(5)(50) == 0
    assert cosine(5)(50) == pytest.approx(0, abs=1e-15)
    assert cosine(5, floor=0.1)(50) == pytest.approx(0.1)
    assert cosine(4, floor=0.1)(2) == pytest.approx(0.55)
    assert constant()(7) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0), "total=0"),
        (lambda: linear(5, 5), "warmup=5 of total=5"),
        (lambda: cosine(5, -1), "warmup=-1"),
        (lambda: cosine(5, floor=1.5), r"floor=1\.5"),
        (lambda: linear(5)(-1), "update -1"),
        (lambda: progress("linear", 5)(-1), "update -1"),
        (lambda: progress("cubic", 0)(-1), "update -1"),
        (lambda: constant()(-1), "update -1"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_rates_grow_for_narrow_models_and_stay_where_no_width_is_named() -> None:
    assert rate_for_width(1e-3, None, 64) == 1e-3
    assert rate_for_width(1e-3, 256, 256) == 1e-3
    assert rate_for_width(1e-3, 256, 16) == pytest.approx(8e-3)


def test_schedules_by_name_are_the_ones_named() -> None:
    for update in range(8):
        assert rate("constant", 8)(update) == 1
        assert rate("linear", 8, 2)(update) == linear(8, 2)(update)
        assert rate("cosine", 8)(update) == cosine(8)(update)
        assert progress("linear", 5)(update) == pytest.approx(min(1, update / 5))
        assert progress("cubic", 5)(update) == pytest.approx(1 - (1 - min(1, update / 5)) ** 3)
        assert progress("linear", 0)(update) == progress("cubic", 0)(update) == 1  # no warm-up: the target at once
    for bad in (lambda: rate("exponential", 8), lambda: progress("square", 8)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is unknown; wanted"):
            bad()
