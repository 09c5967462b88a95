"""The regression that Bonsai publishes (arXiv 2402.05406): a penalty on absolute coefficients, Adam, tuned by held-out
Kendall tau.

For fidelity; `compresso.core.regression.ridge` is exact and instant, and orders units better: where a score is linear
without noise (40 columns, 200 rows), its coefficients agree with the weights to a tau of 1, those of these epochs to
one between 0.4 and 0.8.

As in the authors' code: batches are drawn in a new order every epoch; the learning rate is 1 / (columns that were ever
on x its factor) and halves after 3 epochs without a better tau; the epoch of the best tau is kept, 50 at most, and 10
without a better one end the fit; the grid's best point by mean tau over five folds is then fitted on all rows, which
also judge its epochs.

Departures: a mask and its complement are in one fold; y is centred, predictions are not; a tau without order counts 0
(there it is NaN, and passed over, so that a model that orders rows the wrong way round would win over one that says
nothing); all in float64. The gradient of the loss is written out, so that nothing is recorded for a backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from compresso.core.regression import Linear, check_rows, folds, kendall_tau, observed

EPOCHS = 50
PATIENCE = 10
FOLDS = 5


@dataclass(frozen=True)
class Settings:
    """One point of the grid.

    Args:
        penalty: of the sum of absolute coefficients.
        lr_factor: divides the learning rate.
        batch: rows an update.
    """

    penalty: float
    lr_factor: float
    batch: int


GRID = tuple(Settings(*point) for point in product((1e2, 1e-4, 0.0), (100.0, 10.0, 1.0, 0.1), (32, 64, 128)))
"""The published grid."""


def l1_regression(
    x: Tensor, y: Tensor, seed: int, *, grid: Sequence[Settings] = GRID, epochs: int = EPOCHS, together: int = 1
) -> Linear:
    """The model of the best point of a grid, fitted on all rows.

    Args:
        x: [rows, columns], 0 or 1.
        y: [rows]; higher for better sub-models, so that a unit's coefficient is what it is worth.
        seed: of the order of rows.
        grid: tried in order, of equal ones the first wins; with one point there is nothing to cross-validate.
        epochs: at most.
        together: so many consecutive rows are in one fold.

    Returns:
        The model; `chosen` holds `penalty`, `lr_factor` and `batch`, and with several points `tau`, their best mean
        over the folds: an optimistic one, since each fold also chose its epoch.

    Raises:
        ValueError: as `check_rows` and `folds`, or the grid is empty.
    """
    x, y = observed(x), observed(y)
    check_rows(x, y, together)
    if not grid:
        raise ValueError("grid is empty; give at least one point")
    best, best_tau = grid[0], None
    if len(grid) > 1:
        parted = folds(len(y), FOLDS, together)
        best_tau = float("-inf")
        for settings in grid:
            taus = [fitted(x[~held], y[~held], x[held], y[held], settings, seed, epochs)[1] for held in parted]
            if (tau := sum(taus) / len(taus)) > best_tau:
                best, best_tau = settings, tau
    model, _ = fitted(x, y, x, y, best, seed, epochs)
    chosen = {"penalty": best.penalty, "lr_factor": best.lr_factor, "batch": float(best.batch)}
    return Linear(model.coefficients, model.intercept, chosen if best_tau is None else {**chosen, "tau": best_tau})


def fitted(
    x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor, settings: Settings, seed: int, epochs: int = EPOCHS
) -> tuple[Linear, float]:
    """The model after the epoch whose tau on held-out rows is best, and that tau.
    All tensors are float64 on the CPU.
    """
    mean, columns = float(y.mean()), x.shape[1]
    theta, bias = torch.zeros(columns, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    ever_on = int((x.mean(dim=0) != 0).sum())
    optimizer = torch.optim.Adam([theta, bias], lr=1 / (max(ever_on, 1) * settings.lr_factor))
    schedule = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3, min_lr=1e-5)
    generator = torch.Generator().manual_seed(seed)
    best, best_tau, since = Linear(theta.clone(), mean), float("-inf"), 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(y), generator=generator), settings.batch):
            residuals = x[rows] @ theta + bias - (y[rows] - mean)
            theta.grad = 2 / len(rows) * (x[rows].T @ residuals) + settings.penalty * theta.sign()
            bias.grad = 2 * residuals.mean()
            optimizer.step()  # pyright: ignore
        tau = kendall_tau(x_held @ theta, y_held)
        schedule.step(tau)  # pyright: ignore
        if tau >= best_tau:
            best, best_tau, since = Linear(theta.clone(), float(bias) + mean), tau, 0
        else:
            since += 1
            if since == PATIENCE:
                break
    return best, best_tau
