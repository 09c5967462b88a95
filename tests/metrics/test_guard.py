"""The guard: published cases get the verdict they deserve, thresholds are where they say, and nothing unmeasured passes
as ok.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compresso.errors import DataError, NumericError
from compresso.metrics.guard import REFUSE_GROWTH, WARN_GROWTH, Guard, judge, rise_interval


def of_perplexities(dense: float, pruned: float, **more: float) -> Guard:
    return judge(vocabulary=32_000, dense_loss=math.log(dense), pruned_loss=math.log(pruned), **more)


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (12.62, 17.58, "ok"),  # LLaMA-7B, 20 % of its parameters pruned and tuned
        (12.62, 11.9, "ok"),  # better than before
        (12.62, 38.12, "warn"),  # 50 %, tuned
        (12.62, 106.07, "refuse"),  # 50 %, not tuned
        (12.62, 582.41, "refuse"),  # 20 % by magnitude, not tuned
        (16.11, 3539.98, "refuse"),
    ],
)
def test_published_models_get_the_verdict_they_deserve(dense: float, pruned: float, verdict: str) -> None:
    found = of_perplexities(dense, pruned, dense_degenerate=0.125, pruned_degenerate=0.125)
    assert found.verdict == verdict
    assert f"{pruned / dense:.3g} times" in found.message()


def test_the_thresholds_are_where_they_say() -> None:
    for threshold, below, above in [(WARN_GROWTH, "ok", "warn"), (REFUSE_GROWTH, "warn", "refuse")]:
        assert of_perplexities(10, 10 * threshold * 0.999).verdict == below
        assert of_perplexities(10, 10 * threshold * 1.001).verdict == above


def test_a_loss_no_better_than_guessing_is_refused_where_growth_alone_would_pass() -> None:
    guess = math.log(512)
    found = judge(vocabulary=512, dense_loss=guess - 0.9, pruned_loss=guess + 0.01)
    assert found.verdict == "refuse"
    assert [one.verdict for one in found.checks] == ["warn", "refuse", "unchecked"]
    assert f"{guess + 0.01:.3f} nats" in found.message() and f"refused from {guess:.3f}" in found.message()


@pytest.mark.parametrize(
    ("dense", "pruned", "texts", "verdict"),
    [
        (0.0, 0.125, 24, "ok"),
        (0.0, 0.25, 24, "warn"),
        (0.125, 0.625, 24, "warn"),
        (0.125, 0.875, 24, "warn"),  # texts alone refuse nothing
        (0.5, 1.0, 24, "warn"),
        (1.0, 1.0, 24, "ok"),
        (0.25, 0.5, 8, "ok"),  # two more of eight may be chance
        (0.25, 0.5, 80, "warn"),
    ],
)
def test_broken_texts_warn_by_their_rise(dense: float, pruned: float, texts: int, verdict: str) -> None:
    found = of_perplexities(10, 11, dense_degenerate=dense, pruned_degenerate=pruned, texts=texts)
    assert found.verdict == verdict
    assert (
        f"{dense:.0%} to {pruned:.0%} of {texts}" in found.checks[2].words and "95 % interval" in found.checks[2].words
    )


@given(st.integers(1, 200), st.data())
def test_the_interval_of_a_rise_holds_it_and_stays_within_bounds(n: int, data: st.DataObject) -> None:
    before, after = (data.draw(st.integers(0, n)) / n for _ in range(2))
    low, high = rise_interval(before, after, n)
    assert -1 - 1e-9 <= low <= after - before <= high <= 1 + 1e-9
    opposite = rise_interval(after, before, n)
    assert (low, high) == pytest.approx((-opposite[1], -opposite[0]))


def test_the_interval_of_a_rise_holds_the_truth_as_often_as_it_says() -> None:
    """By simulation: of 2,000 pairs of samples about 95 % have an interval with the true rise in it."""
    generator = torch.Generator().manual_seed(0)
    n, before, after = 24, 0.2, 0.5
    held = 0
    for _ in range(2000):
        drawn = [float((torch.rand(n, generator=generator) < share).sum()) / n for share in (before, after)]
        low, high = rise_interval(*drawn, n)
        held += low <= after - before <= high
    assert 0.93 < held / 2000 < 0.975


@given(
    st.floats(-0.49, 3),
    st.floats(0, 12),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.floats(0, 1)),
    st.integers(2, 10**6),
)
def test_an_untrained_model_is_never_refused(
    above: float, pruned: float, before: float | None, after: float | None, vocabulary: int
) -> None:
    loss = math.log(vocabulary) + above
    found = judge(
        vocabulary=vocabulary, dense_loss=loss, pruned_loss=pruned, dense_degenerate=before, pruned_degenerate=after
    )
    assert found.verdict == "unchecked" and "nothing to lose" in found.message()


def test_what_was_not_measured_is_not_ok() -> None:
    nothing = judge(vocabulary=100, dense_loss=None, pruned_loss=None)
    assert nothing.verdict == "unchecked" and {one.verdict for one in nothing.checks} == {"unchecked"}
    assert (
        "not known" in nothing.message()
        and "not measured" in nothing.message()
        and "no text was generated" in nothing.message()
    )
    only_text = judge(vocabulary=100, dense_loss=None, pruned_loss=None, dense_degenerate=0.0, pruned_degenerate=0.0)
    assert only_text.verdict == "unchecked"
    only_loss = of_perplexities(10, 11)
    assert only_loss.verdict == "ok" and "no text was generated" in only_loss.message()
    shares = {"dense_degenerate": 0.0, "pruned_degenerate": 1.0, "texts": 24}
    assert judge(vocabulary=100, dense_loss=None, pruned_loss=None, **shares).verdict == "warn"


def test_more_loss_is_never_judged_better() -> None:
    order = ["ok", "warn", "refuse"]
    verdicts = [order.index(of_perplexities(10, 5 + i).verdict) for i in range(200)]
    assert verdicts == sorted(verdicts) and set(verdicts) == {0, 1, 2}


def test_the_message_is_one_line_and_a_refusal_names_the_cure() -> None:
    for pruned in (11, 20, 100):
        message = of_perplexities(10, pruned, dense_degenerate=0.0, pruned_degenerate=0.0).message()
        assert "\n" not in message and message.endswith(".")
        assert ("--allow-collapsed" in message) == (pruned == 100)
    assert "warned from 1.5, refused from 5" in of_perplexities(10, 20).message()


def test_a_guard_is_a_record_that_comes_back() -> None:
    found = of_perplexities(10, 20, dense_degenerate=0.0, pruned_degenerate=0.5)
    assert Guard.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError):
        Guard.model_validate(found.model_dump() | {"verdict": "fine"})


def test_bad_input_is_refused() -> None:
    for loss in (math.nan, math.inf):
        with pytest.raises(NumericError, match="pruned_loss"):
            judge(vocabulary=100, dense_loss=2.0, pruned_loss=loss)
    with pytest.raises(DataError, match="vocabulary=1"):
        judge(vocabulary=1, dense_loss=0.0, pruned_loss=0.0)
    with pytest.raises(DataError, match=r"pruned_degenerate=1\.5"):
        of_perplexities(10, 11, dense_degenerate=0.0, pruned_degenerate=1.5)
    assert of_perplexities(10, 1e200).verdict == "refuse"  # beyond what exp could hold twice over
