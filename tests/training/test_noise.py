"""Noise is a function of (seed, update, row) and touches nothing else."""

import threading

import pytest
import torch

from compresso.training.noise import EDGE, NoiseAhead, gate_noise, mixed_seed


def test_noise_is_uniform_and_strictly_inside_the_unit_interval():
    u = gate_noise(1, 2, 100_000)
    assert u.shape == (100_000,) and u.dtype == torch.float32
    assert u.min() >= EDGE * 0.99 and u.max() < 1
    assert u.logit().isfinite().all()
    assert abs(u.mean() - 0.5) < 3 * (1 / 12 / 100_000) ** 0.5


def test_noise_repeats_for_the_same_update_and_differs_for_any_other():
    assert torch.equal(gate_noise(1, 2, 9), gate_noise(1, 2, 9))
    assert not torch.equal(gate_noise(1, 2, 9), gate_noise(1, 3, 9))
    assert not torch.equal(gate_noise(1, 2, 9), gate_noise(2, 2, 9))
    assert not torch.equal(gate_noise(1, 2, 9), gate_noise(2, 1, 9))


def test_an_example_draws_the_same_however_the_batch_is_split():
    whole = gate_noise(1, 2, 5, range(8))
    assert whole.shape == (8, 5)
    assert torch.equal(whole, torch.cat([gate_noise(1, 2, 5, range(3)), gate_noise(1, 2, 5, range(3, 8))]))
    assert len({tuple(row) for row in whole.tolist()}) == 8


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    gate_noise(1, 2, 5)
    gate_noise(1, 2, 5, range(3))
    assert torch.equal(before, torch.get_rng_state())


def test_mixed_seeds_differ_between_neighbours_and_fit_torch():
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("threaded", [False, True])
def test_noise_drawn_ahead_is_the_noise_that_was_asked_for(threaded: bool) -> None:
    """Two parts an update, an update done anew in halves, a jump, one draw for all, and the first part once more."""
    noise = NoiseAhead(3, 9, torch.device("cpu"), threaded)
    parts = [range(4), range(4, 8)]
    asked: list[tuple[int, range | None]] = [(update, part) for update in range(3) for part in parts]
    asked += [(3, range(4)), (3, range(2)), (3, range(2, 4)), (7, range(4)), (8, None), (9, None), (9, range(4))]
    for update, rows in asked:
        assert torch.equal(noise.draw(update, rows), gate_noise(3, update, 9, rows))


def test_what_comes_next_is_drawn_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, range | None, bool]] = []

    def noted(seed: int, update: int, n: int, rows: range | None = None) -> torch.Tensor:
        drawn.append((update, rows, threading.current_thread() is threading.main_thread()))
        return torch.zeros(n)

    monkeypatch.setattr("compresso.training.noise.gate_noise", noted)
    noise = NoiseAhead(0, 2, torch.device("cpu"), threaded=True)
    parts = [range(4), range(4, 8)]
    for update in range(4):
        for part in parts:
            noise.draw(update, part)
    assert [(update, rows) for update, rows, here in drawn if here] == [(0, parts[0]), (0, parts[1]), (1, parts[0])]
