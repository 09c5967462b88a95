"""Principal directions of a stream. The oracles are the singular vectors of the stream itself, sums over every
subset of axes, and the authors' printed widths.
"""

from itertools import combinations

import pytest
import torch

from compresso.core.slicing import principal, sliced_width, without_mean


def stream(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64) * torch.arange(1, width + 1)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixed


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_what_is_lost_is_what_the_singular_values_say_and_nothing_loses_less(kept: int) -> None:
    seen = stream(40, 6)
    found = principal(seen.T @ seen, 0.01, centred=False)
    cut = found.basis[:, :kept]
    torch.testing.assert_close(cut.T @ cut, torch.eye(kept, dtype=torch.float64), atol=1e-12, rtol=0)
    lost = (seen - seen @ cut @ cut.T).square().sum() / seen.square().sum()
    assert found.lost(kept) == pytest.approx(float(lost), abs=1e-12)
    values = torch.linalg.svdvals(seen).square()
    assert float(lost) == pytest.approx(float(values[kept:].sum() / values.sum()), abs=1e-12)
    alone = seen.square().sum(dim=0)
    assert lost <= min(1 - alone[list(some)].sum() / alone.sum() for some in combinations(range(6), kept))
    assert bool((found.shares.diff() <= 1e-12).all())


def test_damping_turns_no_direction_and_orders_none() -> None:
    seen = stream(40, 6)
    moment = seen.T @ seen
    plain, damped = (principal(moment, damping, centred=False) for damping in (0.0, 0.1))
    torch.testing.assert_close(
        (plain.basis.T @ damped.basis).abs(), torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(plain.shares, damped.shares, atol=1e-12, rtol=1e-9)


def test_a_centred_stream_leaves_its_mean_out_last_even_where_nothing_else_was_seen() -> None:
    seen = stream(3, 8)  # fewer tokens than dimensions: most directions hold nothing
    found = principal(seen.T @ seen, 0.01, centred=True)
    ones = torch.ones(8, dtype=torch.float64) / 8**0.5
    assert (found.basis[:, :-1].T @ ones).abs().max() < 1e-7
    assert float((found.basis[:, -1] @ ones).abs()) == pytest.approx(1)
    means = without_mean(seen)
    assert found.lost(3) < 1e-12 < principal(seen.T @ seen, 0.01, centred=False).lost(2)
    torch.testing.assert_close(means @ found.basis[:, :3] @ found.basis[:, :3].T, means, atol=1e-9, rtol=0)


def test_a_stream_of_nothing_has_no_directions() -> None:
    for moment in (torch.zeros(4, 4), torch.full((4, 4), float("nan"))):
        with pytest.raises(ValueError, match="has no directions"):
            principal(moment, 0.01, centred=False)


def test_widths_are_those_of_the_published_code() -> None:
    assert [sliced_width(4096, keep, 8) for keep in (0.75, 0.7)] == [3072, 2864]
    assert sliced_width(10, 0.7, 1) == 7  # .7 times 10 is a little less than 7
    assert sliced_width(576, 1.0, 100) == 576 and sliced_width(7, 0.5, 8) == 0
