"""Regressions against the normal equations, fits without the rows themselves, and counts by hand.

Oracles: torch.linalg on the augmented least-squares system (an intercept column that is not penalised); brute force for
left-out rows; Kendall's tau counted by hand, ties by the textbook's formula for tau-b.
"""

import math

import pytest
import torch
from torch import Tensor

from compresso.core import l1_regression as published
from compresso.core.l1_regression import GRID, Settings, fitted, l1_regression
from compresso.core.regression import cross_validated_tau, folds, kendall_tau, ridge


def problem(rows: int, columns: int, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Random 0/1 rows, a score that is linear in them but for noise, and the weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(2, (rows, columns), generator=generator).double()
    weights = torch.randn(columns, generator=generator, dtype=torch.float64)
    return x, x @ weights + 5 + noise * torch.randn(rows, generator=generator, dtype=torch.float64), weights


def with_complements(masks: Tensor) -> Tensor:
    return torch.stack([masks, ~masks], dim=1).flatten(0, 1)


def least_squares(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, float]:
    """Ridge as plain least squares: a row of sqrt(strength) for each column but the intercept's."""
    rows, columns = x.shape
    penalty = math.sqrt(strength) * torch.eye(columns, columns + 1, dtype=torch.float64)
    system = torch.cat([torch.cat([x, torch.ones(rows, 1, dtype=torch.float64)], dim=1), penalty])
    solution = torch.linalg.lstsq(
        system, torch.cat([y, torch.zeros(columns, dtype=torch.float64)]).unsqueeze(1), driver="gelsd"
    ).solution
    return solution[:-1, 0], float(solution[-1])


@pytest.mark.parametrize(("rows", "columns"), [(40, 6), (20, 60)])
@pytest.mark.parametrize("relative", [1e-3, 1.0, 30.0])
def test_ridge_is_penalised_least_squares(rows: int, columns: int, relative: float) -> None:
    x, y, _ = problem(rows, columns)
    model = ridge(x, y, strengths=[relative])
    theta, intercept = least_squares(x, y, model.chosen["strength"])
    torch.testing.assert_close(model.coefficients, theta, atol=1e-8, rtol=1e-7)
    assert model.intercept == pytest.approx(intercept, abs=1e-7)
    torch.testing.assert_close(model(x), x @ theta + intercept, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(24, 5), (16, 40)])
def test_left_out_errors_are_those_of_fits_without_the_rows(rows: int, columns: int, together: int) -> None:
    x, y, _ = problem(rows, columns, seed=together)
    model = ridge(x, y, strengths=[0.2], together=together)
    errors: list[Tensor] = []
    for held in folds(rows, rows // together, together):
        theta, intercept = least_squares(x[~held], y[~held], model.chosen["strength"])
        errors.append((x[held] @ theta + intercept - y[held]).square())
    assert model.chosen["left_out_error"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-8)


def test_the_strength_with_the_least_left_out_error_is_taken() -> None:
    x, y, _ = problem(60, 30, noise=4.0)
    each = {s: ridge(x, y, strengths=[s]).chosen for s in (100.0, 1.0, 0.1, 1e-3)}
    best = min(each.values(), key=lambda chosen: chosen["left_out_error"])
    assert ridge(x, y, strengths=list(each)).chosen == best
    assert best not in (each[100.0], each[1e-3])  # else the ends alone would do, and nothing was chosen


def test_without_noise_ridge_finds_the_weights_and_for_a_constant_score_none() -> None:
    x, y, weights = problem(60, 10, noise=0)
    torch.testing.assert_close(ridge(x, y).coefficients, weights, atol=1e-3, rtol=0)
    flat = ridge(x, torch.full((60,), 2.5))
    assert not flat.coefficients.any()
    assert flat.intercept == 2.5


def test_pairs_left_out_alone_flatter_a_fit_that_knows_nothing_of_new_masks() -> None:
    """Why rows go together: the complement in the fit gives its mask away, on columns far too many to be told apart."""
    generator = torch.Generator().manual_seed(0)
    x = with_complements(torch.randint(2, (40, 400), generator=generator, dtype=torch.bool)).double()
    y = x @ torch.randn(400, generator=generator, dtype=torch.float64)
    assert cross_validated_tau(lambda x, y: ridge(x, y), x, y, n_folds=80) == 0  # one row has no order
    alone, pairs = (ridge(x, y, together=n).chosen["left_out_error"] / float(y.var()) for n in (1, 2))
    assert alone < 0.1
    assert pairs > 0.5


@pytest.mark.parametrize(
    ("x", "y", "together", "message"),
    [
        ((4, 2), (3,), 1, r"x \[4, 2\] and y \[3\]"),
        ((5, 2), (5,), 2, "5 rows do not make at least two groups of 2"),
        ((2, 2), (2,), 2, "2 rows do not make at least two groups of 2"),
    ],
)
def test_rows_that_cannot_be_left_out_are_refused(
    x: tuple[int, int], y: tuple[int], together: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ridge(torch.ones(x), torch.ones(y), together=together)


def test_values_that_are_not_finite_and_no_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        ridge(torch.eye(3), torch.tensor([1.0, float("inf"), 0.0]))
    for strengths in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="above 0"):
            ridge(torch.eye(3), torch.ones(3), strengths=strengths)


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [3, 1, 2, 5, 4], 4 / 10),  # 7 pairs agree, 3 do not
        ([1, 1, 2, 3], [1, 2, 3, 3], 4 / 5),  # 4 agree, 1 tie on either side: 4 / sqrt(5 * 5)
        ([1, 1, 1, 2], [1, 2, 3, 4], 3 / math.sqrt(3 * 6)),
        ([2, 2, 2], [1, 2, 3], 0.0),
    ],
)
def test_tau_by_hand(a: list[float], b: list[float], tau: float) -> None:
    assert kendall_tau(torch.tensor(a), torch.tensor(b)) == pytest.approx(tau, abs=1e-12)
    assert kendall_tau(torch.tensor(b), torch.tensor(a)) == pytest.approx(tau, abs=1e-12)


@pytest.mark.parametrize(("rows", "n_folds", "together"), [(10, 5, 1), (64, 5, 2), (14, 3, 2), (12, 2, 4)])
def test_folds_part_the_rows_and_no_group(rows: int, n_folds: int, together: int) -> None:
    parted = torch.stack(folds(rows, n_folds, together))
    assert (parted.sum(dim=0) == 1).all()
    sizes = parted.sum(dim=1)
    assert int(sizes.max() - sizes.min()) <= together
    grouped = parted.reshape(n_folds, -1, together)
    assert (grouped.all(dim=2) == grouped.any(dim=2)).all()


def test_more_folds_than_groups_are_refused() -> None:
    for rows, n_folds, together in ((4, 3, 2), (4, 1, 1), (5, 2, 2)):
        with pytest.raises(ValueError, match=f"do not make {n_folds} folds"):
            folds(rows, n_folds, together)


def test_cross_validated_tau_is_high_where_the_score_is_linear_and_about_nothing_where_it_is_noise() -> None:
    x, y, _ = problem(100, 12, noise=0.1)
    assert cross_validated_tau(ridge, x, y) > 0.9
    noise = [torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(5)]
    assert abs(sum(cross_validated_tau(ridge, x, y) for y in noise)) / 5 < 0.1


def test_the_published_grid() -> None:
    assert len(GRID) == 36
    assert GRID[0] == Settings(100.0, 100.0, 32)


def pairs_of_masks(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """100 masks and their complements, what they score, and the units' worth; units 3 and 7 are of no use."""
    generator = torch.Generator().manual_seed(3)
    x = with_complements(torch.randint(2, (100, columns), generator=generator, dtype=torch.bool)).double()
    weights = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.05
    weights[[3, 7]] = 0.0
    return x, x @ weights, weights


def test_the_published_regression_ranks_units_and_a_seed_fixes_it() -> None:
    """Under inference mode, so that nothing can be kept for gradients."""
    x, y, weights = pairs_of_masks(12)
    grid = [Settings(1e2, 10, 32), Settings(1e-4, 0.1, 32)]
    with torch.inference_mode():
        model, again, other = (l1_regression(x, y, seed, grid=grid, together=2) for seed in (0, 0, 1))
    assert kendall_tau(model.coefficients, weights) > 0.9
    assert set(model.coefficients.argsort()[:2].tolist()) == {3, 7}
    assert model.chosen["penalty"] == 1e-4
    assert model.chosen["tau"] > 0.9
    assert torch.equal(model.coefficients, again.coefficients)
    assert not torch.equal(model.coefficients, other.coefficients)
    assert not model.coefficients.requires_grad


@pytest.mark.parametrize("settings", [Settings(0.0, 1.0, 32), Settings(0.01, 0.1, 64), Settings(100.0, 10.0, 128)])
def test_the_published_epochs_are_those_of_autograd(settings: Settings) -> None:
    """Written again with a graph, PyTorch's own losses, and the authors' rule of stopping: over 10 epochs since the
    best.
    """
    x, y, _ = pairs_of_masks(40)
    y = y - 0.3 * x[:, 0] * x[:, 1] * x[:, 5]
    theta, bias = (
        torch.zeros(40, 1, dtype=torch.float64, requires_grad=True),
        torch.zeros(1, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.Adam([theta, bias], lr=1 / (40 * settings.lr_factor))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3, min_lr=1e-5)
    generator, best, wanted, since = torch.Generator().manual_seed(5), -1e5, theta.detach().clone(), 0
    for _ in range(50):
        for rows in torch.randperm(200, generator=generator).split(settings.batch):
            loss = torch.nn.functional.mse_loss((x[rows] @ theta + bias).squeeze(1), y[rows] - y.mean())
            (loss + settings.penalty * theta.abs().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        tau = kendall_tau((x @ theta).squeeze(1), y)
        if tau >= best:
            best, wanted, since = tau, theta.detach().clone(), 0
        schedule.step(tau)
        since += 1
        if since > 10:
            break
    found = l1_regression(x, y, 5, grid=[settings])
    torch.testing.assert_close(found.coefficients, wanted.squeeze(1), atol=1e-9, rtol=1e-7)


def test_the_published_penalty_keeps_coefficients_of_no_use_small_and_one_point_needs_no_folds() -> None:
    x, y, _ = problem(80, 20, noise=1.0)
    free, held = (l1_regression(x, y, 0, grid=[Settings(penalty, 0.1, 32)]) for penalty in (0.0, 1.0))
    assert "tau" not in free.chosen
    assert float(held.coefficients.abs().sum()) < float(free.coefficients.abs().sum())
    with pytest.raises(ValueError, match="grid is empty"):
        l1_regression(x, y, 0, grid=[])


def test_the_first_published_steps_by_hand() -> None:
    """One epoch of one batch from zero moves every coefficient by the learning rate, in the direction of its
    correlation with y.
    """
    x = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    y = torch.tensor([3.0, -1.0, 2.0, 0.0])
    model = l1_regression(x, y, 0, grid=[Settings(0.0, 10.0, 4)], epochs=1)
    rate = 1 / (2 * 10)  # two columns are ever on
    torch.testing.assert_close(
        model.coefficients, torch.tensor([rate, -rate, 0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert model.intercept == pytest.approx(1.0, abs=1e-6)


def test_the_grid_is_judged_by_rows_that_no_epoch_saw() -> None:
    x, y, _ = problem(50, 30, noise=6.0)
    grid = [Settings(0.0, 1.0, 32), Settings(0.0, 0.1, 32)]
    means = [
        sum(fitted(x[~held], y[~held], x[held], y[held], settings, 0)[1] for held in folds(50, 5, 2)) / 5
        for settings in grid
    ]
    chosen = l1_regression(x, y, 0, grid=grid, together=2).chosen
    assert chosen["tau"] == max(means)
    assert chosen["lr_factor"] == grid[means.index(max(means))].lr_factor


def test_of_epochs_that_order_alike_the_last_is_kept() -> None:
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(10, 1)
    model = l1_regression(x, 2 * x[:, 0], 0, grid=[Settings(0.0, 10.0, 4)])
    assert float(model.coefficients) == pytest.approx(2, abs=0.2)  # the first epoch moves it by 0.5 at most


@pytest.mark.parametrize(("worse", "best"), [(9, 0.9), (10, 0.5)])
def test_ten_epochs_without_a_better_tau_end_the_fit(monkeypatch: pytest.MonkeyPatch, worse: int, best: float) -> None:
    taus = iter([0.5, *[0.1] * worse, 0.9])
    monkeypatch.setattr(published, "kendall_tau", lambda *_: next(taus))
    x, y, _ = problem(8, 2)
    assert fitted(x, y, x, y, Settings(0.0, 1.0, 8), 0, epochs=worse + 2)[1] == best
