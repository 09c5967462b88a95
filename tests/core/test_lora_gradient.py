"""LoRAPrune's importance against its definition, computed densely; the step it stands for; its schedule (arXiv
2305.18403, section 3.2).
"""

import pytest
import torch

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.lora_gradient import (
    EPSILON,
    Factors,
    cubic_progress,
    estimated_gradient,
    moved_average,
    unit_importance,
)


def _factors(out: int, into: int, rank: int, seed: int, scale: float = 0.5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b, a, db, da = (
        torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, into), (out, rank), (rank, into))
    )
    return Factors(b, a, db, da, scale)


def test_it_is_the_change_of_one_step_of_gradient_descent() -> None:
    factors = _factors(6, 5, 2, 0)
    step = (factors.b - factors.db) @ (factors.a - factors.da) - factors.b @ factors.a
    torch.testing.assert_close(-estimated_gradient(factors), step, atol=1e-6, rtol=1e-6)


def test_units_add_up_their_rows_and_columns_of_every_matrix_with_an_adapter() -> None:
    """Two units of two rows of q, one row of k (no adapter), two columns of o."""
    q, o = _factors(4, 3, 2, 1), _factors(3, 4, 2, 2)
    weights = {"q": torch.randn(4, 3), "o": torch.randn(3, 4)}
    axis = Axis("heads", Kind.HEAD, 2, (Slice("q", 0, 2), Slice("k", 0, 1), Slice("o", 1, 2)), (), "")
    found = unit_importance(axis, weights.__getitem__, {"q": q, "o": o})
    dense = {
        name: ((one.db @ one.a + one.b @ one.da - one.db @ one.da) * (weights[name] + 0.5 * one.b @ one.a)).abs()
        for name, one in (("q", q), ("o", o))
    }
    rows = torch.stack([dense["q"][:2].sum(), dense["q"][2:].sum()])
    columns = torch.stack([dense["o"][:, :2].sum(), dense["o"][:, 2:].sum()])
    wanted = rows / (rows.norm() + EPSILON) + columns / (columns.norm() + EPSILON)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-7)


def test_an_axis_without_adapters_has_no_score() -> None:
    with pytest.raises(ValueError, match="no matrix of heads has an adapter"):
        unit_importance(Axis("heads", Kind.HEAD, 2, (Slice("q", 0, 2),), (), ""), {}.__getitem__, {})


def test_the_moving_average_passes_over_what_is_not_finite() -> None:
    old, new = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]
    assert moved_average(old, new, 0.9)[0].tolist() == pytest.approx([1.2, 1.8])
    assert moved_average(old, [torch.tensor([float("nan"), 0.0])], 0.9)[0].tolist() == [1.0, 2.0]


def test_the_schedule() -> None:
    assert [cubic_progress(k, 100) for k in (0, 10, 90, 100)] == [0, 0, 1, 1]
    assert cubic_progress(50, 100) == pytest.approx(0.875)
    assert all(cubic_progress(k, 50) <= cubic_progress(k + 1, 50) for k in range(50))
