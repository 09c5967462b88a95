"""Rounding inside training: the published vectors, few levels, rows apart, rows of zeros, gradients as if not there."""

import pytest
import torch
from torch import Tensor

from compresso.core.quantisers import Quantiser, Style, binary, ternary
from compresso.core.rounding import fit, fit_signed

COMPAT = Style.DEEPSPEED
EVERY = [
    Quantiser(bits, symmetric, style)
    for bits in (1, 2, 4, 8)
    for symmetric in (True, False)
    for style in Style
    if bits > 2 or symmetric
]
every = pytest.mark.parametrize("quantiser", EVERY, ids=lambda q: f"{q.bits}-{q.style}-{q.symmetric}")


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0))


def test_the_public_quantisers_give_the_published_vectors() -> None:
    """Of the specification: +max is clipped to 7/8, the greatest of a range is never reached."""
    symmetric = Quantiser(4, style=COMPAT)(torch.tensor([8.0, -8.0, 4.0, 1.0]))
    assert symmetric.tolist() == [7.0, -8.0, 4.0, 1.0]
    asymmetric = Quantiser(4, False, COMPAT)(torch.tensor([0.0, 15.0, 7.5]))
    assert asymmetric.tolist() == [0.0, 14.0625, 7.5]


def test_textbook_quantisers_reach_both_ends() -> None:
    assert Quantiser(4)(torch.tensor([7.0, -7.0, 3.4])).tolist() == [7.0, -7.0, 3.0]
    assert Quantiser(4, False)(torch.tensor([0.0, 15.0, 7.4])).tolist() == [0.0, 15.0, 7.0]
    found = Quantiser(4, False)(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 0.4, 2.0]))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_textbook_grids_are_those_of_the_weight_methods(bits: int, rows: Tensor) -> None:
    torch.testing.assert_close(Quantiser(bits)(rows), fit_signed(rows, bits).round(rows))
    torch.testing.assert_close(Quantiser(bits, False)(rows), fit(rows, bits).round(rows))


def test_binary_and_ternary_are_the_published_means() -> None:
    row = torch.tensor([[1.0, -3.0, 2.0, -2.0]])
    assert binary(row).tolist() == [[2.0, -2.0, 2.0, -2.0]]
    assert ternary(row).tolist() == [[0.0, -7 / 3, 7 / 3, -7 / 3]] or torch.allclose(
        ternary(row), torch.tensor([[0.0, -7 / 3, 7 / 3, -7 / 3]])
    )
    pruned = torch.tensor([[1.0, 0.0, 0.0, -3.0]])
    assert binary(pruned).tolist() == [[2.0, 0.0, 0.0, -2.0]]  # means are of what is left
    assert ternary(pruned).tolist() == [[0.0, 0.0, 0.0, -3.0]]


@every
def test_a_row_has_few_levels_and_is_near_itself(quantiser: Quantiser, rows: Tensor) -> None:
    found = quantiser(rows)
    assert all(len(row.unique()) <= {1: 2, 2: 3}.get(quantiser.bits, 2**quantiser.bits) for row in found)
    if quantiser.bits > 2:  # a step and a half at the end that a public grid does not reach
        wide = 2 * rows.abs().amax(1) if quantiser.symmetric else rows.amax(1) - rows.amin(1)
        step = wide / (2**quantiser.bits - 2)
        assert bool(((found - rows).abs().amax(1) <= (1.5 if quantiser.style is COMPAT else 1.0) * step).all())
        assert bool(((found - rows).abs().median(1).values <= 0.5 * step).all())


@every
def test_rows_do_not_see_each_other(quantiser: Quantiser, rows: Tensor) -> None:
    other = rows.clone()
    other[2] *= 100
    assert torch.equal(quantiser(rows)[[0, 1, 3, 4]], quantiser(other)[[0, 1, 3, 4]])


@every
def test_gradients_pass_unchanged_also_through_the_clamp(quantiser: Quantiser, rows: Tensor) -> None:
    rows.requires_grad_(True)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (quantiser(rows) * weights).sum().backward()
    assert rows.grad is not None and torch.equal(rows.grad, weights)
    with torch.no_grad():
        assert torch.equal(quantiser(rows), quantiser(rows.detach()))


@every
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_a_row_without_a_range_becomes_no_nan(quantiser: Quantiser, value: float) -> None:
    found = quantiser(torch.full((2, 6), value))
    assert bool(found.isfinite().all())
    if quantiser.style is COMPAT and quantiser.symmetric and quantiser.bits > 2 and value > 0:
        wanted = value * (1 - 2 ** (1 - quantiser.bits))  # the end that is never reached
    else:
        wanted = value
    torch.testing.assert_close(found, torch.full((2, 6), wanted))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_twice_is_rounding_once(bits: int, rows: Tensor) -> None:
    once = Quantiser(bits)(rows)
    torch.testing.assert_close(Quantiser(bits)(once), once)


@pytest.mark.parametrize("style", Style)
def test_zeros_stay_zeros_on_a_grid_around_0(style: Style, rows: Tensor) -> None:
    rows[:, ::3] = 0
    for bits in (1, 2, 4, 8):
        assert not Quantiser(bits, True, style)(rows)[:, ::3].any()


def test_a_known_range_is_the_range(rows: Tensor) -> None:
    low, high = rows.min(), rows.max()
    for symmetric in (True, False):
        quantiser = Quantiser(4, symmetric)
        torch.testing.assert_close(
            quantiser.within(rows, low, high), quantiser(rows.reshape(1, -1)).reshape(rows.shape)
        )


def test_16_bits_are_no_rounding(rows: Tensor) -> None:
    assert Quantiser(16)(rows) is rows and Quantiser(16).within(rows, rows.min(), rows.max()) is rows


def test_other_bits_are_refused() -> None:
    for bits in (0, 9, 15, 17):
        with pytest.raises(ValueError, match=f"bits={bits}: wanted 1 to 8, or 16"):
            Quantiser(bits)
    with pytest.raises(ValueError, match="give symmetric=True"):
        Quantiser(2, symmetric=False)
    with pytest.raises(ValueError, match="levels that are means"):
        Quantiser(2).within(torch.ones(3), torch.zeros(()), torch.ones(()))
