"""Gates of a context. Oracles: the closed forms of alpha-entmax at 1, 1.5 and 2, its defining equation elsewhere,
finite differences, and products of gates written out in a loop.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from compresso.core.context_gates import (
    STEP,
    alpha_schedule,
    keep_log_mask,
    kept_by_steps,
    least_log_mask,
    least_scores,
    others,
    raised,
    sigma,
)

Z = torch.linspace(-3, 3, 601, dtype=torch.float64)
ALPHAS = [1.0, 1.2, 1.5, 2.0, 4.0, 8.0]


def scores(*shape: int, seed: int = 0, scale: float = 0.6, shift: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift


def causal(n: int, padded: tuple[int, ...] = ()) -> Tensor:
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    for k in padded:
        visible[:, k] = visible[k] = False
    return visible


def of_products(z: Tensor, visible: Tensor, alpha: float) -> Tensor:
    """What is left [queries, keys], by the definition."""
    n = len(z)
    left = torch.zeros_like(z)
    for k in range(n):
        for q in range(k, n):
            gates = [sigma(z[j, k], alpha) for j in range(k + 1, q + 1) if visible[j, k]]
            left[q, k] = math.prod(float(gate) for gate in gates) if visible[q, k] else 0.0
    return left


def test_closed_forms() -> None:
    torch.testing.assert_close(sigma(Z, 1.0), Z.sigmoid(), rtol=0, atol=1e-7)
    middle = ((Z + (8 - Z.square()).clamp(min=0).sqrt()) / 4).square()
    torch.testing.assert_close(sigma(Z, 1.5), torch.where(Z.abs() < 2, middle, (Z > 0).double()), rtol=0, atol=1e-7)
    torch.testing.assert_close(sigma(Z, 2.0), ((1 + Z) / 2).clamp(0, 1), rtol=0, atol=1e-7)
    assert torch.equal(sigma(Z, STEP), (Z > 0).double())


@pytest.mark.parametrize("alpha", ALPHAS[1:])
def test_between_the_thresholds_the_two_coordinates_are_entmax_and_beyond_them_exact(alpha: float) -> None:
    p, beta = sigma(Z, alpha), alpha - 1
    inside = Z.abs() < 1 / beta
    torch.testing.assert_close((p.pow(beta) - (1 - p).pow(beta))[inside] / beta, Z[inside], rtol=0, atol=1e-6)
    assert (p[1 / beta <= Z] == 1).all() and (p[-1 / beta >= Z] == 0).all()
    assert ((p > 0) & (p < 1))[inside & (Z.abs() < 0.99 / beta)].all()


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [*product([1.001, 1.05, 1.25, 3.0, 8.4, 8.6], [torch.float32, torch.float64]), (30.0, torch.float64)],
)
def test_the_lesser_coordinate_is_that_of_plain_bisection(alpha: float, dtype: torch.dtype) -> None:
    beta = alpha - 1
    z = torch.linspace(-min(1 / beta, 12), min(1 / beta, 12), 1001, dtype=dtype)[1:-1]
    low, high = torch.full_like(z, -200, dtype=torch.float64), torch.full_like(z, math.log(0.5), dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        above = (torch.expm1(beta * middle) - torch.expm1(beta * torch.log1p(-middle.exp()))) / beta > -z.double().abs()
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    lesser = torch.minimum(sigma(z, alpha), 1 - sigma(z, alpha)).double()
    torch.testing.assert_close(lesser, low.exp(), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_those_of_finite_differences(alpha: float) -> None:
    z = scores(6, 6, seed=3, scale=0.2, shift=0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: sigma(given, alpha), (z,))

    def used(given: Tensor) -> Tensor:
        log_mask, left = keep_log_mask(given, causal(6, padded=(2,)), alpha)
        return (log_mask.clamp(min=-50).exp() * torch.arange(36.0).view(6, 6)).sum() + 3 * left

    assert torch.autograd.gradcheck(used, (z,))


@pytest.mark.parametrize("alpha", [*ALPHAS, STEP])
def test_what_is_left_is_the_product_of_gates_along_queries(alpha: float) -> None:
    z, visible = scores(9, 9), causal(9, padded=(0, 4))
    log_mask, left = keep_log_mask(z, visible, alpha)
    wanted = of_products(z, visible, alpha)
    torch.testing.assert_close(log_mask.exp(), wanted, rtol=1e-6, atol=1e-9)
    assert left.item() == pytest.approx(float((wanted * others(visible)).sum()), rel=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nothing_comes_back_and_no_token_drops_itself(alpha: float) -> None:
    visible = causal(24)
    left = keep_log_mask(scores(24, 24), visible, alpha)[0].exp()
    assert (left.diagonal() == 1).all()
    down = left[1:] - left[:-1]
    assert (down[visible[:-1]] <= 0).all()
    assert (left[~visible] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0, STEP])
def test_a_large_offset_keeps_everything_exactly(alpha: float) -> None:
    visible = causal(24)
    log_mask, left = keep_log_mask(scores(24, 24) + 20, visible, alpha)
    assert (log_mask[visible] == 0).all() and left == others(visible).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_zeros_are_finite_in_every_dtype_and_have_no_gradient(dtype: torch.dtype) -> None:
    z = torch.full((6, 6), -5.0).requires_grad_()
    log_mask, left = keep_log_mask(z, causal(6), 2.0)
    low = log_mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    weights = (low + torch.zeros(6, 6, dtype=dtype)).softmax(-1)
    (weights.float().square().sum() + left).backward()
    assert torch.equal(weights.float(), torch.eye(6))
    assert z.grad is not None and (z.grad == 0).all()


def test_a_small_gate_keeps_its_gradient_among_many_queries() -> None:
    z = torch.full((64, 64), 0.7, dtype=torch.float64).requires_grad_()
    log_mask, _ = keep_log_mask(z, causal(64), 1.5)
    assert 0 < log_mask[-1, 0].exp() < 0.05  # 63 gates of .95
    log_mask[-1, 0].backward()
    assert z.grad is not None
    assert (z.grad[1:, 0] > 0).all() and (z.grad[:, 1:] == 0).all() and z.grad[0, 0] == 0


def test_steps_are_the_limit_of_alpha() -> None:
    z, visible = scores(3, 12, 12, scale=1.0), causal(12).expand(3, 12, 12)
    kept = kept_by_steps(z, others(visible)) & visible
    assert torch.equal(kept, keep_log_mask(z, visible, STEP)[0] == 0)
    away = torch.where(z.abs() < 0.1, torch.full_like(z, 0.2), z)
    assert torch.equal(
        kept_by_steps(away, others(visible)) & visible, keep_log_mask(away, visible, 200.0)[0].exp() > 0.5
    )


def test_alpha_follows_half_a_cosine() -> None:
    alpha = alpha_schedule(1, 8, 25_000)
    assert alpha(0) == 1 and alpha(12_500) == pytest.approx(4.5) and alpha(25_000) == alpha(60_000) == 8
    assert alpha(6_250) == pytest.approx(1 + 7 * (1 - math.cos(math.pi / 4)) / 2)
    assert alpha_schedule(2, 6, 0)(0) == 6


def test_dual_ascent_finds_the_weight_at_which_the_target_is_met() -> None:
    gamma, live = 0.0, 1.0
    for _ in range(4_000):
        gamma = raised(gamma, live, target=0.25, rate=0.05)
        live = math.exp(-gamma)  # less is live under a higher weight
    assert live == pytest.approx(0.25, abs=1e-6)
    assert gamma == pytest.approx(math.log(4), abs=1e-5)


def test_bad_alpha() -> None:
    with pytest.raises(ValueError, match=r"alpha=0\.5 of a gate"):
        sigma(Z, 0.5)


def test_the_least_score_is_a_gate_of_the_worst_query_so_far() -> None:
    z, visible, n = scores(9, 9, seed=4), causal(9, padded=(0, 4)), 9
    log_mask, left = least_log_mask(z, visible, 3.0)
    wanted = torch.zeros(n, n, dtype=torch.float64)
    total = 0.0
    for q in range(n):
        for k in range(q + 1):
            if visible[q, k]:
                so_far = [float(z[j, k]) for j in range(k + 1, q + 1) if visible[j, k]]
                wanted[q, k] = 1 / (1 + math.exp(-3.0 * min(so_far))) if so_far else 1.0
                total += float(wanted[q, k]) if k < q else 0.0
    torch.testing.assert_close(log_mask.exp(), wanted, rtol=0, atol=1e-12)
    assert left.item() == pytest.approx(total)


def test_a_least_score_and_a_product_are_one_once_gates_are_steps() -> None:
    z, visible = scores(40, 40, seed=2), causal(40, padded=(3,))
    product_mask, product_left = keep_log_mask(z, visible, STEP)
    least_mask, least_left = least_log_mask(z, visible, 1e9)
    torch.testing.assert_close(least_mask.exp(), product_mask.exp(), rtol=0, atol=1e-12)
    assert least_left.item() == pytest.approx(product_left.item())
    pairs = others(visible)
    assert torch.equal((least_scores(z, visible) > 0)[pairs], (product_mask.exp() > 0)[pairs])


def test_least_scores_have_the_gradients_of_finite_differences() -> None:
    z = scores(6, 6, seed=3).requires_grad_()

    def used(given: Tensor) -> Tensor:
        log_mask, left = least_log_mask(given, causal(6, padded=(2,)), 2.0)
        return (log_mask.clamp(min=-50).exp() * torch.arange(36.0).view(6, 6)).sum() + 3 * left

    assert torch.autograd.gradcheck(used, (z,))
