"""Removing groups of columns against closed forms: the four identities of exact structured OBS, and what follows.

Oracles: torch.linalg on the normal equations, the published update written out step by step, and trying everything.
"""

from itertools import product
from typing import Any

import pytest
import torch
from tests.core.test_obs import layer, moment_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.obs_groups import Elimination, Quadratic, damped, group_scores, nested, quadratic, refit

CLOSE = {"atol": 1e-9, "rtol": 1e-8}


def columns(n: int, width: int) -> Tensor:
    return torch.arange(n * width).reshape(n, width)


def made(n: int, width: int, seed: int, rows: int = 7) -> tuple[Tensor, Quadratic]:
    weight, inputs = layer(rows, n * width, seed)
    return weight, quadratic(moment_of(inputs))


def kept_after(order: tuple[int, ...], k: int, groups: Tensor) -> Tensor:
    return torch.cat([groups[:0].flatten(), *(groups[i] for i in range(len(groups)) if i not in order[:k])])


def lost(weight: Tensor, cost: Quadratic, kept: Tensor) -> float:
    """tr(D H D^T) of the best fit on these columns, by the normal equations."""
    change = -weight
    if len(kept):
        change = change.clone()
        change[:, kept] += torch.linalg.solve(cost.moment[kept][:, kept], (weight @ cost.moment[:, kept]).T).T
    return float(torch.trace(change @ cost.moment @ change.T))


@pytest.mark.parametrize(("n", "width"), [(6, 1), (5, 4), (150, 1), (40, 3)])
def test_the_weights_of_any_level_are_those_of_the_published_steps_and_the_least_squares_fit(
    n: int, width: int
) -> None:
    weight, cost = made(n, width, 1)
    groups = columns(n, width)
    order = nested(Elimination.of(weight, cost), groups).order
    now, inverse, alive = weight.clone(), torch.linalg.inv(cost.moment), torch.ones(n * width, dtype=torch.bool)
    for k, one in enumerate(order):
        kept = kept_after(order, k, groups)
        torch.testing.assert_close(refit(weight, cost.moment, kept), now[:, kept], **CLOSE)
        if k in (0, n // 2, n - 1):
            fit = torch.linalg.solve(cost.moment[kept][:, kept], (weight @ cost.moment[:, kept]).T).T
            torch.testing.assert_close(now[:, kept], fit, **CLOSE)
        s = groups[one]
        block = torch.linalg.inv(inverse[s][:, s])
        now = now - now[:, s] @ block @ inverse[s]
        inverse = inverse - inverse[:, s] @ block @ inverse[s]
        alive[s] = False
        now[:, ~alive] = 0


@pytest.mark.parametrize(("n", "width"), [(6, 1), (5, 4), (150, 1), (70, 2)])
def test_errors_are_those_of_the_quadratic_and_rise_to_all_that_there_is(n: int, width: int) -> None:
    weight, cost = made(n, width, 2)
    groups = columns(n, width)
    found = nested(Elimination.of(weight, cost), groups)
    assert sorted(found.order) == list(range(n))
    assert len(found.errors) == n + 1 and found.errors[0] == 0
    assert list(found.errors) == sorted(found.errors)
    for k in {1, 2, n // 2, n - 1, n}:
        assert found.errors[k] == pytest.approx(lost(weight, cost, kept_after(found.order, k, groups)), rel=1e-8)
    assert found.errors[-1] == pytest.approx(float(torch.trace(weight @ cost.moment @ weight.T)), rel=1e-9)


@pytest.mark.parametrize(("n", "width"), [(8, 1), (6, 3), (90, 1), (3, 40)])
def test_what_is_left_of_the_inverse_is_the_inverse_of_what_is_left(n: int, width: int) -> None:
    weight, cost = made(n, width, 3)
    groups, now = columns(n, width), Elimination.of(weight, cost)
    for k in range(1, n):
        now.remove(groups[k - 1])
        live = torch.arange(k * width, n * width)
        torch.testing.assert_close(
            now.inverse[live][:, live], torch.linalg.inv(cost.moment[live][:, live]), atol=1e-10, rtol=1e-7
        )
        assert not now.inverse[: k * width].any() and not now.inverse[:, : k * width].any()


@pytest.mark.parametrize(("n", "width", "seed"), list(product([5], [1, 2, 4], range(6))))
def test_the_first_to_leave_is_the_one_whose_best_fit_without_it_loses_least(n: int, width: int, seed: int) -> None:
    """And at every later step, given those that left before."""
    weight, cost = made(n, width, seed + 10)
    groups, gone = columns(n, width), list[int]()
    for one in nested(Elimination.of(weight, cost), groups).order:
        tried = {
            i: lost(weight, cost, kept_after((*gone, i), len(gone) + 1, groups)) for i in range(n) if i not in gone
        }
        assert one == min(tried, key=lambda i: tried[i])
        gone.append(one)


def test_scores_are_what_each_alone_would_cost() -> None:
    weight, cost = made(6, 3, 4)
    groups, whole = columns(6, 3), Elimination.of(weight, cost)
    scores, _ = group_scores(*whole.blocks(groups))
    for i in range(6):
        assert float(scores[i]) == pytest.approx(lost(weight, cost, kept_after((i,), 1, groups)), rel=1e-9)
        after = whole.fork()
        after.remove(groups[i])
        assert after.error == pytest.approx(float(scores[i]), rel=1e-9)
    assert whole.error == 0


@pytest.mark.parametrize("width", [1, 3])
def test_other_places_change_the_order_with_them_and_no_error(width: int) -> None:
    weight, cost_inputs = layer(6, 12 * width, 5)
    moment, groups = moment_of(cost_inputs), columns(12, width)
    places = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = groups[places].flatten()
    found = nested(Elimination.of(weight, quadratic(moment)), groups)
    other = nested(Elimination.of(weight[:, moved], quadratic(moment[moved][:, moved])), groups)
    assert [int(places[i]) for i in other.order] == list(found.order)
    torch.testing.assert_close(torch.tensor(other.errors), torch.tensor(found.errors), **CLOSE)


def test_scaling_inputs_and_weights_against_each_other_changes_nothing_without_damping() -> None:
    weight, inputs = layer(6, 10, 6)
    scale = torch.linspace(0.2, 5, 10, dtype=torch.float64)
    one = nested(Elimination.of(weight, quadratic(moment_of(inputs), 1e-12)), columns(10, 1))
    other = nested(Elimination.of(weight / scale, quadratic(moment_of(inputs * scale[:, None]), 1e-12)), columns(10, 1))
    assert one.order == other.order


def test_the_damping_does_not_depend_on_the_scale_of_the_moment_or_on_dead_inputs() -> None:
    weight, inputs = layer(6, 10, 7)
    inputs[[2, 7]] = 0
    small, large = (quadratic(moment_of(inputs) * by) for by in (1e-6, 1e6))
    torch.testing.assert_close(small.moment * 1e12, large.moment)
    live = [i for i in range(10) if i not in (2, 7)]
    alone = quadratic(moment_of(inputs[live]))
    torch.testing.assert_close(large.moment[live][:, live] / 1e6, alone.moment)
    orders = [nested(Elimination.of(weight, cost), columns(10, 1)).order for cost in (small, large)]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("width", [1, 2])
def test_dead_columns_leave_first_and_at_no_cost(width: int) -> None:
    weight, inputs = layer(5, 8 * width, 8)
    dead = [1, 4, 6]
    inputs[[i * width + j for i in dead for j in range(width)]] = 0
    found = nested(Elimination.of(weight, quadratic(moment_of(inputs))), columns(8, width))
    assert sorted(found.order[:3]) == dead
    assert found.errors[:4] == (0, 0, 0, 0)
    assert found.errors[4] > 0
    kept = torch.tensor([i for i in range(8 * width) if i // width not in dead])
    assert torch.equal(refit(weight, damped(moment_of(inputs))[0], kept), weight[:, kept])


def test_of_twins_either_may_leave_and_the_other_one_takes_over() -> None:
    """The sum of both weights is what the twin needs, and then it is needed."""
    weight, inputs = layer(5, 6, 9)
    inputs[4] = inputs[1]
    cost = quadratic(moment_of(inputs), 1e-6)
    found = nested(Elimination.of(weight, cost), columns(6, 1))
    assert found.order[0] in (1, 4)
    twin = 5 - found.order[0]
    assert found.errors[1] < 1e-5 * found.errors[-1]
    kept = torch.tensor([i for i in range(6) if i != found.order[0]])
    fitted = refit(weight, cost.moment, kept)[:, kept.tolist().index(twin)]
    torch.testing.assert_close(fitted, weight[:, 1] + weight[:, 4], atol=1e-3, rtol=1e-3)
    alone, _ = group_scores(*Elimination.of(weight, cost).blocks(columns(6, 1)))
    assert found.errors[list(found.order).index(twin) + 1] > 1e3 * float(alone[twin])


def test_teams_lose_one_each() -> None:
    weight, cost = made(8, 3, 11)
    groups, whole = columns(8, 3), Elimination.of(weight, cost)
    found = nested(whole, groups, teams=[i // 2 for i in range(8)])
    assert sorted(i // 2 for i in found.order) == [0, 1, 2, 3]
    assert found.order[0] == int(group_scores(*Elimination.of(weight, cost).blocks(groups))[0].argmin())
    kept = kept_after(found.order, 4, groups)
    assert found.errors[-1] == pytest.approx(lost(weight, cost, kept), rel=1e-8)
    rest = nested(whole, torch.stack([groups[i] for i in range(8) if i not in found.order]))
    assert rest.errors[0] == found.errors[-1]
    assert rest.errors[-1] == pytest.approx(float(torch.trace(weight @ cost.moment @ weight.T)), rel=1e-9)


def test_of_no_groups_none_leaves() -> None:
    weight, cost = made(4, 2, 3)
    whole = Elimination.of(weight, cost)
    whole.remove(torch.tensor([0, 1]))
    found = nested(whole, columns(4, 2)[:0])
    assert found.order == () and found.errors == (whole.error,) and whole.error > 0


def test_forks_go_their_own_ways() -> None:
    weight, cost = made(6, 2, 12)
    groups, one = columns(6, 2), Elimination.of(weight, cost)
    one.remove(groups[0])
    other = one.fork()
    one.remove(groups[1])
    other.remove(groups[2])
    for state, gone in ((one, (0, 1)), (other, (0, 2))):
        assert state.error == pytest.approx(lost(weight, cost, kept_after(gone, 2, groups)), rel=1e-8)


def test_keeping_all_or_nothing_needs_no_fit() -> None:
    weight, cost = made(4, 2, 13)
    assert torch.equal(refit(weight, cost.moment, torch.arange(8)), weight)
    assert refit(weight, cost.moment, torch.arange(0)).shape == (7, 0)


def test_an_ill_conditioned_layer_in_float32_keeps_its_errors_exact() -> None:
    """Inputs of rank 20 in 200 columns: only the damping makes the moment invertible."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(200, 20, generator=generator)
    inputs = basis @ torch.randn(20, 4000, generator=generator) + 1e-3 * torch.randn(200, 4000, generator=generator)
    weight = torch.randn(30, 200, generator=generator)
    cost = quadratic(inputs @ inputs.T / 4000)
    found = nested(Elimination.of(weight, cost), columns(200, 1))
    for k in (1, 100, 170, 185, 199):
        kept = kept_after(found.order, k, columns(200, 1))
        assert found.errors[k] == pytest.approx(lost(weight.double(), cost, kept), rel=1e-6)


def test_damping_grows_until_the_moment_can_be_inverted_or_is_given_up() -> None:
    indefinite = torch.eye(4, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    assert quadratic(indefinite, 0.01).damping == pytest.approx(0.1)
    with pytest.raises(NotPositiveDefiniteError, match=r"even with damping 1e-05 in float64"):
        quadratic(indefinite, 1e-8)
    with pytest.raises(NotPositiveDefiniteError, match="what stays of the second moment"):
        refit(torch.ones(2, 4), damped(indefinite)[0], torch.tensor([0, 1]))


def test_a_moment_that_is_not_finite_is_refused() -> None:
    moment = torch.eye(3)
    moment[0, 1] = torch.nan
    with pytest.raises(NotPositiveDefiniteError, match="NaN or Inf"):
        quadratic(moment)


class Waits(TorchDispatchMode):
    """Counts how often a number is asked of a tensor: on a GPU each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1, 2])
def test_an_order_does_not_wait_for_the_device_at_every_removal(width: int) -> None:
    counts: list[int] = []
    for n in (6, 30):
        weight, cost = made(n, width, 14)
        whole, groups = Elimination.of(weight, cost), columns(n, width)
        with Waits() as waits:
            nested(whole, groups)
        counts.append(waits.n)
    assert counts[0] == counts[1] <= 4


@pytest.mark.parametrize("width", [1, 2])
def test_an_inverse_that_rounding_has_used_up_is_said_behind_the_order(width: int) -> None:
    weight, cost = made(6, width, 15)
    bad = cost.inverse.clone()
    bad[3] *= -1
    with pytest.raises(NotPositiveDefiniteError, match="what stays of the second moment"):
        nested(Elimination(weight.T @ weight, bad), columns(6, width))
