"""Grids whose ends are learned: at full range the plain grid, zero stays zero, ends learn what rounding costs."""

import pytest
import torch

from compresso.core.learned_clipping import clipped_rounding
from compresso.core.rounding import fit


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_whole_ranges_it_is_rounding_to_the_nearest(bits: int) -> None:
    given, whole = weights(), torch.ones(6, 1)
    torch.testing.assert_close(clipped_rounding(given, whole, whole, bits), fit(given, bits).round(given))


def test_zero_stays_and_a_row_has_few_values() -> None:
    given = weights()
    given[0] = 0
    given[:, ::3] = 0
    found = clipped_rounding(given, torch.full((6, 1), 0.7), torch.full((6, 1), 0.4), 3)
    assert bool((found[:, ::3] == 0).all()) and bool(found.isfinite().all())
    assert max(len(row.unique()) for row in found) <= 8


def test_the_ends_learn_to_leave_out_one_outlier() -> None:
    given = weights()
    given[:, 0] = 9.0
    low, high = (torch.ones(6, 1, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([low, high], lr=0.01)
    wanted = torch.ones(64)
    wanted[0] = 0.001  # what reads the outlier hardly counts
    errors: list[float] = []
    for _ in range(60):
        adam.zero_grad()
        error = ((clipped_rounding(given, low, high, 3) - given).square() * wanted).sum()
        error.backward()
        adam.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.7 * errors[0]
    assert bool((high < 0.9).all())
