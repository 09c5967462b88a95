"""Prodigy. Oracle: its first step worked out by hand, and a plain transcription of the algorithm in Python numbers."""

import pytest
import torch

from compresso.core.prodigy import Prodigy


def test_the_first_step_by_hand() -> None:
    parameter = torch.zeros(1, dtype=torch.float64)
    prodigy = Prodigy([parameter])
    parameter.grad = torch.ones(1, dtype=torch.float64)
    prodigy.step()
    assert float(parameter) == pytest.approx(-3.1622766e-6, rel=1e-6)
    assert prodigy.d == 1e-6


def test_it_follows_the_algorithm_number_by_number() -> None:
    start, coefficient = [1.5, -2.0], 2.0
    parameters = [torch.tensor([value], dtype=torch.float64) for value in start]
    prodigy = Prodigy(parameters, coefficient=coefficient)
    place, first, second, summed = list(start), [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    d = begun = greatest = 1e-6
    agreed = 0.0
    for _ in range(60):
        gradient = [2 * place[0], 6 * place[1]]
        agreed = 0.999**0.5 * agreed + d / begun * d * sum(
            g * (s - p) for g, s, p in zip(gradient, start, place, strict=True)
        )
        first = [0.9 * m + 0.1 * d * g for m, g in zip(first, gradient, strict=True)]
        second = [0.999 * v + 0.001 * d * d * g * g for v, g in zip(second, gradient, strict=True)]
        summed = [0.999**0.5 * s + d / begun * d * g for s, g in zip(summed, gradient, strict=True)]
        estimate, rate = coefficient * agreed / sum(map(abs, summed)), d
        greatest = max(greatest, estimate)
        d = greatest
        place = [p - rate * m / (v**0.5 + d * 1e-8) for p, m, v in zip(place, first, second, strict=True)]
        parameters[0].grad, parameters[1].grad = 2 * parameters[0], 6 * parameters[1]
        prodigy.step()
    assert [float(one) for one in parameters] == pytest.approx(place, rel=1e-9)
    assert prodigy.d == pytest.approx(d, rel=1e-9) and d > 100 * begun


def test_it_finds_a_rate_that_solves_a_problem_of_any_size() -> None:
    for size in (0.01, 1.0, 100.0):
        parameter, prodigy = (one := torch.full((4,), size)), Prodigy([one])
        for _ in range(400):
            parameter.grad = parameter.clone()
            prodigy.step()
        assert float(parameter.abs().max()) < 0.2 * size


def test_tensors_without_gradients_stay() -> None:
    one, other = torch.ones(2), torch.ones(2)
    prodigy = Prodigy([one, other])
    one.grad = torch.ones(2)
    prodigy.step()
    assert bool((one != 1).all()) and bool((other == 1).all())
    prodigy.zero_grad()
    prodigy.step()
    assert one.grad is None
