"""Closed forms of the hard-concrete distribution,
checked against numbers worked out by hand and against its own draws.
"""

import math

import pytest
import torch

from compresso.core.axis import Kind
from compresso.core.hard_concrete import (
    LOG_ALPHA_HIGH,
    LOG_ALPHA_LOW,
    clamp_,
    expected_kept,
    initial_log_alpha,
    keep_probability,
    sample,
    soft_value,
)

THRESHOLD = 2 / 3 * math.log(11)  # 1.598597


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_clamp_range_is_two_decades_either_way() -> None:
    assert pytest.approx(-4.60517, abs=1e-5) == LOG_ALPHA_LOW
    assert pytest.approx(4.60517, abs=1e-5) == LOG_ALPHA_HIGH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_alpha", "probability"),
    [(0.0, 0.8318222), (math.log(100), 0.9979823), (math.log(0.01), 0.0471298), (5.0, 0.9986396), (-THRESHOLD, 0.5)],
)
def test_keep_probability_anchors(log_alpha: float, probability: float, dtype: torch.dtype) -> None:
    p = keep_probability(torch.tensor([log_alpha], dtype=dtype))
    assert p.dtype == dtype
    assert float(p) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(("log_alpha", "value"), [(math.log(100), 0.9960347), (0.0, 0.5), (-1.598597, 0.1280495)])
def test_soft_value_anchors(log_alpha: float, value: float) -> None:
    assert float(soft_value(double(log_alpha))) == pytest.approx(value, abs=1e-6)


def test_keep_probability_is_kept_away_from_0_and_1() -> None:
    assert keep_probability(double(-50, 50)).tolist() == [1e-6, 1 - 1e-6]


def test_gates_in_reduced_precision_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        keep_probability(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(("u", "log_alpha", "z"), [(0.5, 0.0, 0.5), (0.5, -THRESHOLD, 0.0), (0.5, THRESHOLD, 1.0)])
def test_sampler_vectors(u: float, log_alpha: float, z: float) -> None:
    assert float(sample(double(log_alpha), double(u))) == pytest.approx(z, abs=1e-12)


@pytest.mark.parametrize("log_alpha", [-4.6, -1.6, 0.0, 2.0, 4.6])
def test_draws_are_open_as_often_as_the_closed_form_says(log_alpha: float) -> None:
    n = 100_000
    u = noise(n, seed=0)
    share = float((sample(torch.full((n,), log_alpha, dtype=torch.float64), u) > 0).double().mean())
    p = float(keep_probability(double(log_alpha)))
    assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / n)


def test_draws_saturate_at_one_as_seldom_as_the_closed_form_says() -> None:
    n = 100_000
    u = noise(n, seed=1)
    share = float((sample(torch.full((n,), LOG_ALPHA_HIGH, dtype=torch.float64), u) < 1).double().mean())
    assert abs(share - 0.0471298) < 3 * math.sqrt(
        0.0471298 * 0.9528702 / n
    )  # by symmetry P(z < 1) at a is P(z > 0) at -a


def test_a_gate_is_open_exactly_above_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.randn(5000, generator=generator, dtype=torch.float64) * 3
    u = noise(5000, seed=1)
    assert torch.equal(sample(log_alpha, u) > 0, torch.logit(u) > -(log_alpha + THRESHOLD))


def test_noise_broadcasts_over_examples() -> None:
    log_alpha, u = (
        torch.randn(5, generator=torch.Generator().manual_seed(0)),
        noise(3, 5, seed=1),
    )
    z = sample(log_alpha, u)
    assert z.shape == (3, 5)
    assert torch.equal(z[1], sample(log_alpha, u[1]))


def test_the_gradient_is_zero_where_a_draw_saturates() -> None:
    log_alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sample(log_alpha, double(0.001, 0.5, 0.999)).sum().backward()
    assert log_alpha.grad is not None
    # at u = 1/2: 1.2 * s(1 - s) / temperature with s = 1/2
    assert log_alpha.grad.tolist() == [0.0, pytest.approx(1.2 * 0.25 * 1.5), 0.0]


def test_gradients_match_finite_differences() -> None:
    log_alpha = double(-2.0, -0.3, 0.4, 3.0).requires_grad_()
    u = double(0.7, 0.4, 0.6, 0.2)
    torch.autograd.gradcheck(keep_probability, log_alpha)
    torch.autograd.gradcheck(lambda a: sample(a, u), log_alpha)


@pytest.mark.parametrize(("n", "removed"), [(4096, 8), (11008, 22), (32, 0)])
def test_an_open_model_is_not_dense_at_evaluation(n: int, removed: int) -> None:
    assert expected_kept(torch.full((n,), LOG_ALPHA_HIGH)) == n - removed


@pytest.mark.parametrize(("n", "left"), [(32, 2), (11008, 519), (4096, 193)])
def test_a_closed_axis_keeps_some_units(n: int, left: int) -> None:
    assert expected_kept(torch.full((n,), LOG_ALPHA_LOW)) == left


def test_halves_round_to_even() -> None:
    half = -THRESHOLD  # probability one half each
    assert expected_kept(torch.full((5,), half, dtype=torch.float64)) == 3  # 2.5 are removed: 2
    assert expected_kept(torch.full((3,), half, dtype=torch.float64)) == 1  # 1.5 are removed: 2


def test_clamp_works_in_place_on_a_parameter() -> None:
    log_alpha = torch.nn.Parameter(torch.tensor([-9.0, 0.0, 9.0]))
    clamp_(log_alpha)
    assert log_alpha.tolist() == pytest.approx([LOG_ALPHA_LOW, 0, LOG_ALPHA_HIGH])


@pytest.mark.parametrize(("kind", "mean"), [(Kind.HEAD, 10.0), (Kind.HIDDEN, 10.0), (Kind.CHANNEL, 4.59512)])
def test_initial_log_alpha_by_kind(kind: Kind, mean: float) -> None:
    log_alpha = initial_log_alpha(kind, 20_000, torch.Generator().manual_seed(0))
    assert float(log_alpha.mean()) == pytest.approx(mean, abs=3 * 0.01 / math.sqrt(20_000))
    assert float(log_alpha.std()) == pytest.approx(0.01, rel=0.03)
    assert torch.equal(log_alpha, initial_log_alpha(kind, 20_000, torch.Generator().manual_seed(0)))


def test_initial_log_alpha_of_given_mean_and_bad_rate() -> None:
    assert float(
        initial_log_alpha(Kind.CHANNEL, 5000, torch.Generator().manual_seed(0), mean=5.0).mean()
    ) == pytest.approx(5, abs=1e-3)
    for droprate in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"droprate={droprate}"):
            initial_log_alpha(Kind.CHANNEL, 4, torch.Generator(), droprate=droprate)
