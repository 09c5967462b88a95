"""Units' worth from masks and their complements, and whether it tells unseen masks apart."""

import pytest
import torch

from compresso.core.l1_regression import GRID, l1_regression
from compresso.core.regression import kendall_tau, ridge
from compresso.core.subsets import with_complements
from compresso.core.worth import worths


def masks(pairs: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(pairs)
    return with_complements(torch.randint(2, (pairs, columns), generator=generator, dtype=torch.bool))


def test_the_worth_of_units_and_a_tau_that_noise_does_not_have() -> None:
    x, generator = masks(40, 20), torch.Generator().manual_seed(0)
    given = torch.randn(20, generator=generator, dtype=torch.float64)
    found, tau = worths("ridge", x, x.double() @ given, 0)
    assert kendall_tau(found.coefficients, given) > 0.9
    assert tau > 0.9
    assert torch.equal(found.coefficients, ridge(x, x.double() @ given, together=2).coefficients)
    assert abs(worths("ridge", x, torch.randn(80, generator=generator), 0)[1]) < 0.3


def test_the_published_regression_is_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "compresso.core.l1_regression.l1_regression.__kwdefaults__", {"grid": GRID[-2:], "epochs": 5, "together": 1}
    )
    x = masks(10, 6)
    y = x.double() @ torch.arange(6, dtype=torch.float64)
    found, tau = worths("published", x, y, 3)
    assert torch.equal(found.coefficients, l1_regression(x, y, 3, together=2).coefficients)
    assert -1 <= tau <= 1
