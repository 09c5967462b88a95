"""The column sweep against closed forms: least squares, the quadratic's own minimum, the papers' worked numbers.

Oracles: golden vectors in float64, worked by hand from SparseGPT's algorithm on a 2 x 4 layer; torch.linalg on the
normal equations.
"""

import pytest
import torch
from torch import Tensor

from compresso.core.obs import Choose, NotPositiveDefiniteError, column_sweep, inverse_factor
from compresso.core.rounding import fit
from compresso.core.sparsity import at_most_threshold, lowest_in_groups, lowest_in_rows, lowest_share, wanda_score

X = torch.tensor(
    [[2, -1, 0, 1, 3, -2], [1, 0, 2, -1, 1, 0], [0, 3, -1, 2, -2, 1], [-1, 1, 1, 0, 2, -3]], dtype=torch.float64
)
W = torch.tensor([[3, -1, 2, 1], [1, 2, -2, 4]], dtype=torch.float64)
H = 2 * X @ X.T


def close(found: Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), atol=2e-6, rtol=0)


def fixed(mask: Tensor, every: int = 1) -> Choose:
    return lambda scores, j: mask[:, j : j + scores.shape[1]]


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A layer with correlated inputs of lognormal size: W and X, as the realistic fixture of the acceptance list."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scales = torch.randn(columns, 1, generator=generator, dtype=torch.float64).exp()
    inputs = scales * (mix @ torch.randn(columns, 4 * columns, generator=generator, dtype=torch.float64))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs


def moment_of(inputs: Tensor) -> Tensor:
    return 2 * inputs @ inputs.T / inputs.shape[1]


def change(before: Tensor, after: Tensor, moment: Tensor) -> float:
    return float(torch.trace((after - before) @ moment @ (after - before).T) / 2)


def test_the_factor_of_the_golden_layer() -> None:
    factor = inverse_factor(H)
    close(damped(H).diagonal().unsqueeze(0), [[38.305, 14.305, 38.305, 32.305]])
    close(
        factor.upper,
        [
            [0.205084, -0.021504, 0.066195, -0.089786],
            [0, 0.312061, 0.089894, -0.030132],
            [0, 0, 0.168527, 0.052168],
            [0, 0, 0, 0.175940],
        ],
    )
    scores = W.square() / factor.upper.diagonal().square()
    close(scores, [[213.982828, 10.268842, 140.838016, 32.305], [23.775870, 41.075367, 140.838016, 516.88]])


def test_golden_unstructured_by_the_reference_rule_and_by_exact_count() -> None:
    reference = column_sweep(
        W, inverse_factor(H), choose=lambda scores, _: at_most_threshold(scores, 0.5), every=4, block=4
    )
    close(reference.weight, [[3, 0, 0, 0], [0, 0, 0, 5.547748]])
    assert float(reference.loss.sum()) == pytest.approx(283.593799, abs=1e-5)
    assert int(reference.pruned.sum()) == 6  # a tie at the threshold takes both rows' entries
    exact = column_sweep(W, inverse_factor(H), choose=lambda scores, _: lowest_share(scores, 0.5), every=4, block=4)
    assert int(exact.pruned.sum()) == int((exact.weight == 0).sum()) == 4


def test_golden_two_of_four() -> None:
    swept = column_sweep(
        W, inverse_factor(H), choose=lambda scores, _: lowest_in_groups(scores, 2, 4), every=4, block=4
    )
    close(swept.weight, [[3, 0, 2.288067, 0], [0, 0, -2.929110, 4.641043]])
    assert float(swept.loss.sum()) == pytest.approx(52.953730, abs=1e-5)
    rounded = fit(W, 4)
    close(rounded.scale, [[0.266667], [0.4]])
    assert rounded.zero.flatten().tolist() == [4, 5]
    joint = column_sweep(
        W,
        inverse_factor(H),
        choose=lambda scores, _: lowest_in_groups(scores, 2, 4),
        every=4,
        block=4,
        quantize=lambda weights, j: rounded.round(weights[:, :1], j).squeeze(1),
    )
    close(joint.weight, [[2.933333, 0, 2.133333, 0], [0, 0, -2, 4]])
    assert float(joint.loss.sum()) == pytest.approx(82.053111, abs=1e-5)


def test_golden_gptq_without_damping() -> None:
    weight = torch.tensor([[0.7, 0.7]], dtype=torch.float64)
    moment = torch.tensor([[2, 1], [1, 2]], dtype=torch.float64)
    factor = inverse_factor(moment, damping=0)
    close(factor.upper, [[0.816497, -0.408248], [0, 0.707107]])
    swept = column_sweep(weight, factor, quantize=lambda weights, _: torch.round(weights[:, 0] / 0.5) * 0.5)
    close(swept.weight, [[0.5, 1.0]])
    assert 2 * change(weight, swept.weight, moment) == pytest.approx(0.14)


def test_the_loss_is_that_of_the_damped_quadratic() -> None:
    weight, inputs = layer(16, 32, 0)
    moment = moment_of(inputs)
    swept = column_sweep(
        weight, inverse_factor(moment), choose=lambda scores, _: lowest_share(scores, 0.5), every=8, block=8
    )
    assert float(swept.loss.sum()) == pytest.approx(change(weight, swept.weight, damped(moment)), rel=1e-9)


@pytest.mark.parametrize("block", [1, 7, 16, 24])
def test_with_a_fixed_mask_the_block_size_changes_nothing(block: int) -> None:
    weight, inputs = layer(6, 24, 1)
    factor = inverse_factor(moment_of(inputs))
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = column_sweep(weight, factor, choose=fixed(mask), every=1, block=24)
    torch.testing.assert_close(
        column_sweep(weight, factor, choose=fixed(mask), every=1, block=block).weight, whole.weight, atol=1e-10, rtol=0
    )
    assert torch.equal(whole.pruned, mask)


@pytest.mark.parametrize(
    ("block", "every"), [(4, 4), (48, 4), (96, 32), (100, 50), (128, 2), (128, 128), (33, 3), (40, 40)]
)
def test_columns_taken_together_are_those_taken_one_by_one(block: int, every: int) -> None:
    weight, inputs = layer(5, 150, 21)
    upper = inverse_factor(moment_of(inputs)).upper
    now, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(150):  # SparseGPT's algorithm 1, a column at a time
        if j % block % every == 0:
            stop = min(j + every, j - j % block + block, 150)
            gone[:, j:stop] = lowest_in_rows((now[:, j:stop] / upper.diagonal()[j:stop]).square(), 0.5)
        error = (now[:, j] / upper[j, j]).masked_fill(~gone[:, j], 0)
        now[:, j] = now[:, j].masked_fill(gone[:, j], 0)
        now[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    swept = column_sweep(
        weight, inverse_factor(moment_of(inputs)), choose=lambda s, _: lowest_in_rows(s, 0.5), every=every, block=block
    )
    assert torch.equal(swept.pruned, gone)
    torch.testing.assert_close(swept.weight, now, atol=1e-9, rtol=0)


def test_each_kept_suffix_is_the_minimum_with_the_columns_before_it_frozen() -> None:
    weight, inputs = layer(1, 12, 3)
    moment = damped(moment_of(inputs))
    mask = torch.rand(1, 12, generator=torch.Generator().manual_seed(4)) < 0.5
    factor, now = inverse_factor(moment_of(inputs)), weight[0].clone()
    for j in range(12):
        if mask[0, j]:
            now[j] = 0
            frozen, free = slice(0, j + 1), slice(j + 1, 12)
            moved = (now - weight[0])[frozen]
            now[free] = (
                weight[0, free] - torch.linalg.solve(moment[free, free], moment[free, frozen] @ moved)
                if j < 11
                else now[free]
            )
    torch.testing.assert_close(
        column_sweep(weight, factor, choose=fixed(mask), every=1).weight[0], now, atol=1e-10, rtol=0
    )


def test_pruned_first_is_the_least_squares_refit_and_pruned_last_plain_zeroing() -> None:
    weight, inputs = layer(5, 10, 5)
    factor, moment = inverse_factor(moment_of(inputs)), damped(moment_of(inputs))
    first = torch.arange(10).expand(5, 10) < 4
    refit = weight[:, 4:] + torch.linalg.solve(moment[4:, 4:], moment[4:, :4] @ weight[:, :4].T).T
    torch.testing.assert_close(
        column_sweep(weight, factor, choose=fixed(first), every=1).weight[:, 4:], refit, atol=1e-10, rtol=0
    )
    last = torch.arange(10).expand(5, 10) >= 6
    torch.testing.assert_close(
        column_sweep(weight, factor, choose=fixed(last), every=1).weight, weight.masked_fill(last, 0)
    )


def test_with_uncorrelated_inputs_kept_weights_stay_and_rounding_is_to_the_nearest() -> None:
    weight, _ = layer(5, 10, 6)
    factor = inverse_factor(torch.diag(torch.linspace(1, 3, 10, dtype=torch.float64)))
    swept = column_sweep(weight, factor, choose=lambda scores, _: lowest_share(scores, 0.5), every=10, block=10)
    assert torch.equal(swept.weight, weight.masked_fill(swept.pruned, 0))
    grid = fit(weight, 3)
    rounded = column_sweep(weight, factor, quantize=lambda weights, j: grid.round(weights[:, :1], j).squeeze(1))
    assert torch.equal(rounded.weight, grid.round(weight))


def test_quality_on_correlated_inputs() -> None:
    ratios: list[tuple[float, float, float, float]] = []
    for seed in range(5):
        weight, inputs = layer(64, 128, seed)
        moment = moment_of(inputs)
        swept = column_sweep(weight, inverse_factor(moment), choose=lambda scores, _: lowest_share(scores, 0.5))
        mask = swept.pruned
        refit = weight.clone()
        for row, gone in enumerate(mask):
            kept = ~gone
            refit[row, gone] = 0
            refit[row, kept] += torch.linalg.solve(
                damped(moment)[kept][:, kept], damped(moment)[kept][:, gone] @ weight[row, gone]
            )
        ours = change(weight, swept.weight, moment)
        magnitude = change(weight, weight.masked_fill(lowest_share(weight.abs(), 0.5), 0), moment)
        zeroed = change(weight, weight.masked_fill(mask, 0), moment)
        wanda = wanda_score(weight, inputs.square().sum(dim=1))
        by_wanda = change(weight, weight.masked_fill(lowest_in_rows(wanda, 0.5), 0), moment)
        assert change(weight, refit, damped(moment)) <= change(weight, swept.weight, damped(moment)) * (1 + 1e-9)
        ratios.append((ours / magnitude, ours / zeroed, ours / by_wanda, by_wanda / magnitude))
    assert all(ratio[0] < 0.25 and ratio[1] < 0.95 for ratio in ratios)
    assert sum(ratio[2] for ratio in ratios) / len(ratios) < 0.9


def test_joint_beats_pruning_and_then_rounding() -> None:
    weight, inputs = layer(64, 128, 7)
    moment, grid = moment_of(inputs), fit(weight, 4)
    factor = inverse_factor(moment)
    choose: Choose = lambda scores, _: lowest_in_groups(scores, 2, 4)  # noqa: E731
    apart = column_sweep(weight, factor, choose=choose, every=4)
    joint = column_sweep(
        weight, factor, choose=choose, every=4, quantize=lambda weights, j: grid.round(weights[:, :1], j).squeeze(1)
    )
    assert change(weight, joint.weight, moment) < change(weight, grid.round(apart.weight), moment)
    assert torch.equal(grid.round(joint.weight), joint.weight)
    groups = (joint.pruned.reshape(64, -1, 4)).sum(dim=2)
    assert bool((groups == 2).all())


def test_dead_channels_lose_their_weights_and_nothing_else_is_lost() -> None:
    weight, inputs = layer(4, 8, 8)
    inputs[[2, 5]] = 0
    factor = inverse_factor(moment_of(inputs))
    assert factor.dead.nonzero().flatten().tolist() == [2, 5]
    swept = column_sweep(weight, factor)
    alive = ~factor.dead
    assert torch.equal(swept.weight[:, alive], weight[:, alive])
    assert not swept.weight[:, factor.dead].any()


def test_a_dead_input_counts_as_one_in_the_mean_that_damps() -> None:
    """By hand, as both papers' code: diag(3, 0) becomes diag(3, 1), of mean 2, and a hundredth of it is added."""
    factor = inverse_factor(torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64)), damping=0.01)
    close(factor.upper, [[3.02**-0.5, 0], [0, 1.02**-0.5]])


def test_duplicated_columns_move_into_each_other() -> None:
    weight, inputs = layer(4, 8, 9)
    inputs[1] = inputs[0]
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 0] = True
    swept = column_sweep(weight, inverse_factor(moment_of(inputs), damping=1e-8), choose=fixed(mask), every=1)
    torch.testing.assert_close(swept.weight @ inputs, weight @ inputs, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(swept.weight[:, 1], weight[:, 0] + weight[:, 1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_of_calibration_is_enough_for_a_factor(dtype: torch.dtype) -> None:
    weight, inputs = layer(4, 32, 10)
    moment = moment_of(inputs[:, :1]).to(dtype)
    factor = inverse_factor(moment)
    swept = column_sweep(
        weight.to(dtype), factor, choose=lambda scores, _: lowest_share(scores, 0.5), every=32, block=32
    )
    assert bool(swept.weight.isfinite().all())
    assert int(swept.pruned.sum()) == 64


def test_damping_grows_only_where_it_must_and_is_reported() -> None:
    _, inputs = layer(4, 16, 11)
    assert inverse_factor(moment_of(inputs)).damping == 0.01
    bent = torch.eye(16) + 0
    bent[0, 1] = bent[1, 0] = 1.05  # one eigenvalue is -0.05
    assert inverse_factor(bent).damping == pytest.approx(0.1)
    bent[0, 1] = bent[1, 0] = 20
    with pytest.raises(NotPositiveDefiniteError, match="even with damping 10 in float64"):
        inverse_factor(bent)
    bent[0, 1] = float("nan")
    with pytest.raises(NotPositiveDefiniteError, match="NaN or Inf"):
        inverse_factor(bent)


def test_float64_takes_over_where_float32_cannot_factor() -> None:
    inputs = torch.randint(-9, 10, (32, 3), generator=torch.Generator().manual_seed(12)).float()
    moment = inputs @ inputs.T  # whole numbers, so exact; of rank 3 and damped far below float32's resolution
    assert int(torch.linalg.cholesky_ex(damped(moment, 1e-9)).info)
    factor = inverse_factor(moment, damping=1e-12)
    assert factor.upper.dtype == torch.float32
    wanted = inverse_factor(moment.double(), damping=factor.damping).upper
    torch.testing.assert_close(factor.upper, wanted.float())


def test_equal_weights_are_pruned_exactly_and_by_index() -> None:
    swept = column_sweep(
        torch.ones(3, 8, dtype=torch.float64),
        inverse_factor(torch.eye(8, dtype=torch.float64)),
        choose=lambda scores, _: lowest_in_rows(scores, 0.5),
        every=8,
        block=8,
    )
    assert torch.equal(swept.pruned, (torch.arange(8) < 4).expand(3, 8))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="block=6 is no multiple of the 4 columns"):
        column_sweep(W, inverse_factor(H), choose=fixed(W > 0), every=4, block=6)
    with pytest.raises(ValueError, match="the factor is"):
        column_sweep(W[:, :3], inverse_factor(H))
