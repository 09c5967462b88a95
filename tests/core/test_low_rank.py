"""Laws of truncation: Eckart and Young plain, the identity of SVD-LLM whitened, and ranks that save."""

import pytest
import torch
from torch import Tensor

from compresso.core.low_rank import factored_size, most_rank, rank_for, rank_within, refitted, root_of, truncated
from compresso.core.obs import NotPositiveDefiniteError

SHAPES = [(24, 16), (16, 24), (8, 32), (20, 20)]
"""Also as wide as the keys and values of grouped queries."""


def drawn(rows: int, columns: int, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """A matrix, and inputs [tokens, columns] that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixed
    return weight, inputs * torch.randn(columns, generator=generator, dtype=torch.float64).exp()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_whitened_loss_is_the_sum_of_the_squares_dropped(rows: int, columns: int, rank: int) -> None:
    weight, inputs = drawn(rows, columns)
    found = truncated(weight, rank, root_of(inputs.T @ inputs, 1e-14).lower)
    error = float((inputs @ (weight - found.product).T).square().sum())
    torch.testing.assert_close(error, found.dropped, rtol=1e-7, atol=1e-12 * found.total)
    assert found.total == pytest.approx(float((inputs @ weight.T).square().sum()), rel=1e-9)
    assert found.left.shape == (rows, rank) and found.right.shape == (rank, columns)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_matrix_of_the_rank_is_nearer_on_the_inputs_or_on_its_own(rows: int, columns: int) -> None:
    weight, inputs = drawn(rows, columns)
    plain, whitened = truncated(weight, 4), truncated(weight, 4, root_of(inputs.T @ inputs, 1e-14).lower)
    assert float((weight - plain.product).square().sum()) == pytest.approx(plain.dropped, rel=1e-9)
    on_inputs = [float((inputs @ (weight - one.product).T).square().sum()) for one in (plain, whitened)]
    assert on_inputs[1] < 0.9 * on_inputs[0]
    assert float((weight - whitened.product).square().sum()) > plain.dropped
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):  # no step of the factors is better, in any direction tried
        for _ in range(20):
            left, right = (
                one + size * one.std() * torch.randn(one.shape, generator=generator, dtype=torch.float64)
                for one in (whitened.left, whitened.right)
            )
            assert float((inputs @ (weight - left @ right).T).square().sum()) >= on_inputs[1] * (1 - 1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_full_rank_changes_nothing(rows: int, columns: int) -> None:
    weight, inputs = drawn(rows, columns)
    for lower in (None, root_of(inputs.T @ inputs, 1e-14).lower):
        found = truncated(weight, min(rows, columns), lower)
        torch.testing.assert_close(found.product, weight, rtol=1e-6, atol=1e-6)
        assert found.dropped <= 1e-20 * found.total


def test_inputs_of_few_directions_lose_nothing_within_their_rank() -> None:
    weight, _ = drawn(24, 16)
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = inputs @ torch.randn(3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    root = root_of(inputs.T @ inputs, 1e-9)
    found = truncated(weight, 3, root.lower)
    whole = float((inputs @ weight.T).square().sum())
    assert float((inputs @ (weight - found.product).T).square().sum()) < 1e-6 * whole


def test_a_singular_moment_is_damped_and_says_by_how_much() -> None:
    moment = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    moment[2, 2] = -1e-5  # as rounding leaves it
    found = root_of(moment, 1e-7)
    assert found.damping == pytest.approx(1e-5)
    wanted = moment.double() + 1e-5 * float(moment.double().diagonal().mean()) * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.lower @ found.lower.T, wanted)
    assert root_of(torch.eye(4), 1e-6).damping == 1e-6
    for bad in (torch.zeros(4, 4), torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])), torch.full((2, 2), float("nan"))):
        with pytest.raises(NotPositiveDefiniteError):
            root_of(bad, 1e-6)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.999])
def test_ranks_are_the_highest_that_fit_and_always_save(keep: float) -> None:
    for rows in (1, 2, 3, 8, 16, 100, 192, 576):
        for columns in (1, 2, 3, 8, 30, 576, 1536):
            rank, most = rank_for(rows, columns, keep), most_rank(rows, columns)
            assert factored_size(rows, columns, rank) <= keep * rows * columns * (1 + 1e-9)
            assert factored_size(rows, columns, most) < rows * columns <= factored_size(rows, columns, most + 1)
            assert rank <= most < max(min(rows, columns), 1)
            above = factored_size(rows, columns, rank + 1)
            assert rank == most or above > keep * rows * columns * (1 - 1e-9)


def test_the_shapes_of_published_models_break_even_where_they_should() -> None:
    assert [most_rank(*shape) for shape in ((4096, 4096), (1024, 4096), (576, 576), (192, 576), (1536, 576))] == [
        2047,  # at 2048 the factors are as large as the matrix
        819,
        287,
        143,
        418,
    ]
    assert rank_for(576, 1536, 0.8) == 335
    assert rank_for(10, 10, 0.6) == 3  # exactly: 3 * 20 is 60 of 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_a_rounded_matrix_is_never_given_a_higher_rank_than_it_had(dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 5, 12):
        scale = torch.logspace(0, torch.log10(torch.tensor(spread)).item(), rank, dtype=torch.float64)
        left = torch.randn(24, rank, generator=generator, dtype=torch.float64) * scale
        exact = left @ torch.randn(rank, 20, generator=generator, dtype=torch.float64)
        rounded = exact.to(dtype).double()
        rounding = torch.finfo(dtype).eps / 2
        found = rank_within(torch.linalg.svdvals(rounded), rounding)
        assert found <= rank
        if spread == 1.0:
            assert found == rank
        near = truncated(rounded, found)
        assert near.dropped <= (1.01 * rounding) ** 2 * near.total
    whole = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    assert rank_within(torch.linalg.svdvals(whole), 2**-9) == 20
    assert rank_within(torch.zeros(4, dtype=torch.float64), 2**-9) == 1


def test_no_damping_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="damping=0 never grows; give a share above 0"):
        root_of(torch.zeros(2, 2), 0.0)


def test_a_rank_that_a_matrix_cannot_have_is_refused() -> None:
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank={rank} is none of a matrix \[4, 6\]; give 1 to 4"):
            truncated(torch.ones(4, 6), rank)


def test_a_refitted_left_factor_is_least_squares_on_the_inputs_themselves() -> None:
    """The oracle sees tokens and outputs, not moments."""
    generator = torch.Generator().manual_seed(3)
    inputs, others = (torch.randn(60, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    lower, other = (root_of(one.T @ one, 1e-12).lower for one in (inputs, others))
    found = truncated(weight, 4, lower)
    left = refitted(weight, found.right, other)
    wanted = torch.linalg.lstsq(others @ found.right.T, others @ weight.T).solution.T
    torch.testing.assert_close(left, wanted, atol=1e-8, rtol=1e-8)
    before, after = (((weight - one @ found.right) @ others.T).square().sum() for one in (found.left, left))
    assert after < 0.99 * before
    torch.testing.assert_close(refitted(weight, found.right, lower), found.left, atol=1e-8, rtol=1e-8)
