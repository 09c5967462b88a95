"""Scales between a layer and its inputs: exact before rounding, worth it where inputs have outliers, finite where
inputs are dead.
"""

import pytest
import torch
from torch import Tensor

from compresso.core.rounding import fit
from compresso.core.scales import (
    activation_scales,
    best_scale,
    output_error,
    round_clipped,
    smoothing_scale,
    typical_weight,
)


def layer(outlier: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [32, 64] and inputs [200, 64], one of them `outlier` times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator)
    inputs[:, 5] *= outlier
    return torch.randn(32, 64, generator=generator), inputs


def rtn(weight: Tensor) -> Tensor:
    return fit(weight, 4, group=16).round(weight)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, inputs = layer(10)
    change = rtn(weight) - weight
    wanted = (inputs @ change.T).square().sum() / len(inputs)
    assert output_error(change, inputs.T @ inputs / len(inputs)) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("by_weight", [False, True])
def test_candidates_are_the_paper_s(by_weight: bool) -> None:
    weight, inputs = layer(10)
    size = inputs.abs().mean(dim=0)
    found = dict(activation_scales(size, weight, 16, 20, by_weight))
    assert list(found) == [k / 20 for k in range(20)]
    for r, scale in found.items():
        raw = size**r / ((typical_weight(weight, 16) + 1e-4) ** (1 - r) if by_weight else 1)
        torch.testing.assert_close(scale / raw, (scale / raw)[0].expand(64))
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    if not by_weight:
        torch.testing.assert_close(found[0.0], torch.ones(64))


@pytest.mark.parametrize("by_weight", [False, True])
def test_an_outlier_is_worth_a_scale(by_weight: bool) -> None:
    weight, inputs = layer(100)
    moment = inputs.T @ inputs / len(inputs)
    size = inputs.abs().mean(dim=0)
    exponent, scale, least, plain = best_scale(weight, moment, activation_scales(size, weight, 16, 20, by_weight), rtn)
    assert exponent is not None and scale[5] == scale.max()
    assert least < plain / 2
    assert plain == pytest.approx(output_error(rtn(weight) - weight, moment))
    assert least == pytest.approx(output_error(rtn(weight * scale) / scale - weight, moment), rel=1e-4)


def test_where_no_candidate_helps_nothing_is_scaled() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    worse = iter([(0.5, torch.tensor([1.0, 7.3, 0.2, 1.9]))])
    exponent, scale, least, plain = best_scale(weight, torch.eye(4), worse, lambda w: fit(w, 2).round(w))
    assert exponent is None and scale.tolist() == [1, 1, 1, 1] and least == plain == 0


@pytest.mark.parametrize(("group", "symmetric"), [(16, False), (16, True), (0, False)])
def test_clamping_never_costs_and_pays_at_few_bits(group: int, symmetric: bool) -> None:
    weight, inputs = layer(3)
    weight[:, 3] *= 6
    moment = inputs.T @ inputs / len(inputs)
    rounded = round_clipped(weight, moment, 3, group=group, symmetric=symmetric)
    plain = fit(weight, 3, group=group, symmetric=symmetric).round(weight)
    width = group or 64
    for at in range(0, 64, width):  # group by group and row by row, since a group's error counts its own inputs alone
        part, own = slice(at, at + width), moment[at : at + width, at : at + width]
        for row in range(32):
            errors = [output_error((w - weight)[row : row + 1, part], own) for w in (rounded, plain)]
            assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-6
    assert output_error(rounded - weight, moment.diag().diag()) < output_error(plain - weight, moment.diag().diag())
    for row in rounded.reshape(-1, width):
        assert len(row.unique()) <= 8


def test_smoothing_shares_the_difficulty() -> None:
    weight, inputs = layer(50)
    inputs[:, 7] = 0
    weight[:, 9] = 0
    top = inputs.abs().amax(dim=0)
    scale = smoothing_scale(top, weight, 0.5)
    assert scale[7] == scale[9] == 1
    seen, met = (top / scale)[:7], (weight * scale).abs().amax(dim=0)[:7]
    torch.testing.assert_close(seen, met)  # alpha 0.5: both sides are equally hard
    torch.testing.assert_close(smoothing_scale(top, weight, 1.0)[:7], top[:7])
