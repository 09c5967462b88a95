"""Turns and angles against closed forms, where a difference of cosines has no digits left; runs against all runs."""

import math

import pytest
import torch

from compresso.core.influence import angle, cosine_distance, least_distant_run


@pytest.mark.parametrize("theta", [1e-4, 0.01, 0.5, 2.0, math.pi])
@pytest.mark.parametrize("length", [1.0, 1e-12, 1e30])
def test_a_known_rotation_in_float32(theta: float, length: float) -> None:
    before = torch.tensor([[length, 0.0, 0.0]])
    after = 3 * length * torch.tensor([[math.cos(theta), 0.0, math.sin(theta)]])
    assert float(cosine_distance(before, after)) == pytest.approx(1 - math.cos(theta), rel=1e-5)
    assert float(angle(before, after)) == pytest.approx(theta / math.pi, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_changes_nothing_or_only_the_length_scores_nothing(dtype: torch.dtype) -> None:
    states = torch.randn(5, 7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert cosine_distance(states, states).tolist() == torch.zeros(5, 7).tolist()
    assert float(cosine_distance(states, 4 * states).max()) < 1e-13
    assert float(angle(states, 4 * states).max()) < 1e-6


def test_a_zero_state_has_no_direction() -> None:
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert cosine_distance(states, states).isnan().tolist() == [True, False]
    assert angle(states, states.flip(0)).isnan().tolist() == [True, True]


def test_the_least_turning_run_is_the_least_of_all_runs() -> None:
    distances = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    for n in range(1, 7):
        run = least_distant_run(distances, lambda run, n=n: len(run) >= n)
        assert run is not None and len(run) == n
        assert float(distances[run.start, run.stop]) == min(
            float(distances[start, start + n]) for start in range(7 - n + 1)
        )


def test_runs_reach_both_ends_ties_take_the_first_and_one_layer_stays() -> None:
    flat = torch.zeros(4, 4)
    assert least_distant_run(flat, lambda run: True) == range(0)
    assert least_distant_run(flat, lambda run: len(run) == 2) == range(2)
    last = torch.ones(4, 4)
    last[2, 3] = 0  # behind the last layer
    assert least_distant_run(last, lambda run: len(run) == 1) == range(2, 3)
    assert least_distant_run(flat, lambda run: len(run) == 3) is None
