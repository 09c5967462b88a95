"""The held-out loss against the model's own, and its standard error against draws."""

import math

import pytest
import torch

from compresso.core.row import Row
from compresso.errors import DataError, NumericError
from compresso.metrics.held import HeldLoss, held_loss
from compresso.metrics.record import Environment
from tests.metrics.tiny import tiny

ROWS: list[Row] = [
    {"input_ids": [3, 5, 7, 9, 11], "labels": [-100, -100, 7, 9, 11]},
    {"input_ids": [4, 6, 8], "labels": [4, 6, 8]},
    {"input_ids": [2, 2, 2, 2, 2, 2, 2], "labels": [-100] * 7},
]


def test_it_is_the_models_own_loss_weighted_by_labelled_tokens() -> None:
    model = tiny().eval()
    found = held_loss(model, ROWS, batch_size=2)
    assert found.tokens == (3, 2)
    for row, nats, n in zip(ROWS, found.nats, found.tokens, strict=False):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert nats / n == pytest.approx(float(own), rel=1e-5)
    assert found.mean == pytest.approx(sum(found.nats) / 5)


def test_the_perplexity_and_its_noise_come_with_what_they_were_measured_on() -> None:
    found = HeldLoss((2.0, 4.0, 6.0, 8.0), (2, 2, 2, 2), "ab" * 32)
    one, noise = found.measurements(Environment.here(), "stories", noise=True)
    assert (one.name, one.value, one.n) == ("held/perplexity", pytest.approx(math.exp(2.5)), 8)
    assert noise.name == "noise/held/perplexity"
    # of the three ways to halve four examples, the middle one lies exp(3) - exp(2) apart: 1, 3 against 0, 2
    assert noise.value == pytest.approx(math.exp(3.0) - math.exp(2.0))
    assert noise.protocol == {**one.protocol, "noise": "half-split", "splits": 99}
    assert one.protocol["corpus"] == "stories"


def test_the_standard_error_is_the_spread_over_draws_of_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        tokens = torch.randint(1, 9, (50,), generator=generator)
        nats = tokens * (2 + torch.randn(50, generator=generator, dtype=torch.float64))
        one = HeldLoss(tuple(nats.tolist()), tuple(tokens.tolist()), "")
        means.append(one.mean)
        errors.append(one.stderr)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(means).std()), rel=0.1)
    assert HeldLoss((1.0,), (1,), "").stderr is None
    assert HeldLoss((1.0,), (1,), "").half_split() is None


def test_nothing_to_score_and_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="no labelled token"):
        held_loss(tiny(), ROWS[2:])
    model = tiny(tied=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NumericError, match="overflows"):
        held_loss(model, ROWS)
