"""Grids against worked numbers: four bits on (-1, 0, 0.5, 2), asymmetric and as GPTQ's code symmetric."""

import pytest
import torch

from compresso.core.rounding import fit, recovered

W = torch.tensor([[-1, 0, 0.5, 2]], dtype=torch.float64)


def test_golden_asymmetric() -> None:
    grid = fit(W, 4)
    assert float(grid.scale) == pytest.approx(0.2)
    assert float(grid.zero) == 5
    assert grid.codes(W).tolist() == [[0, 5, 7, 15]]  # 2.5 rounds to even
    torch.testing.assert_close(grid.round(W), torch.tensor([[-1, 0, 0.4, 2]], dtype=torch.float64))


def test_golden_symmetric() -> None:
    grid = fit(W, 4, symmetric=True)
    assert float(grid.scale) == pytest.approx(4 / 15)
    assert grid.codes(W).tolist() == [[4, 8, 10, 15]]
    wanted = torch.tensor([[-1.066667, 0, 0.533333, 1.866667]], dtype=torch.float64)
    torch.testing.assert_close(grid.round(W), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("clip", [False, True])
def test_laws(bits: int, symmetric: bool, group: int, clip: bool) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, 3] = 0
    grid = fit(weight, bits, group=group, symmetric=symmetric, clip=clip)
    rounded = grid.round(weight)
    assert grid.scale.shape == (6, 32 // (group or 32))
    torch.testing.assert_close(grid.round(rounded), rounded)  # points are points
    assert not rounded[:, 3].any()  # zero stays zero
    codes = grid.codes(weight)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(grid.round(weight[:, 5:7], 5), rounded[:, 5:7])
    if not clip and not symmetric:
        assert float((rounded - weight).abs().max()) <= float(grid.scale.max()) * (1 + 1e-9)


def test_more_bits_and_smaller_groups_err_less_and_clipping_never_more() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, 0] *= 8

    def error(power: float, bits: int, **knobs: bool | int) -> float:
        return float((fit(weight, bits, **knobs).round(weight) - weight).abs().pow(power).sum())  # type: ignore[arg-type]

    assert error(2, 8) < error(2, 4) < error(2, 3) < error(2, 2)
    assert error(2, 4, group=16) < error(2, 4)
    assert error(2.4, 3, clip=True) < error(2.4, 3)


def test_a_clipped_range_has_the_least_sum_of_errors_to_the_power_of_2_4() -> None:
    """Oracle: 80 ranges of each row tried by hand. Squares would choose other ranges."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def best(row: torch.Tensor, power: float) -> float:
        found: list[tuple[float, float]] = []
        for step in range(80):
            low, high = (end * (1 - step / 100) for end in (float(row.min()), float(row.max())))
            scale = (high - low) / 7
            zero = round(-low / scale)
            error = (torch.round(row / scale).clamp(-zero, 7 - zero) * scale - row).abs().pow(power).sum()
            found.append((float(error), scale))
        return min(found)[1]

    scales = fit(weight, 3, clip=True).scale.flatten().tolist()
    assert scales == pytest.approx([best(row, 2.4) for row in weight])
    assert all(abs(scale / best(row, 2.0) - 1) > 0.01 for scale, row in zip(scales[:2], weight, strict=False))


def test_rows_of_zeros_and_bad_knobs() -> None:
    assert not fit(torch.zeros(2, 4), 4).round(torch.zeros(2, 4)).any()
    with pytest.raises(ValueError, match="bits=1: wanted 2 to 8"):
        fit(W, 1)
    with pytest.raises(ValueError, match="group=3 does not divide 4 inputs"):
        fit(W, 4, group=3)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_is_recovered_from_its_values(bits: int, group: int, dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    rounded = fit(weight, bits, group=group, symmetric=symmetric).round(weight).to(dtype)
    grid = recovered(rounded, bits, group, symmetric=symmetric)
    assert grid is not None
    torch.testing.assert_close(grid.round(rounded.float()), rounded.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert recovered(weight, bits, group, symmetric=symmetric) is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_are_recovered_in_float32(symmetric: bool) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rounded = fit(weight, 8, symmetric=symmetric).round(weight)
    grid = recovered(rounded, 8, symmetric=symmetric)
    assert grid is not None
    torch.testing.assert_close(grid.round(rounded), rounded, rtol=1e-6, atol=0)
