"""The published rules, by hand on a layer of three outputs and two inputs."""

from itertools import pairwise

import torch

from compresso.core.context import Uses, used

SHOWN = Uses(
    inputs=torch.tensor([0.0, 2.0]),
    outputs=torch.tensor([0.0, 0.5, 3.0]),
    unbiased=torch.tensor([0.0, 0.01, 2.0]),
    activated=torch.tensor([0.0, 0.4, 0.001]),
)


def test_each_rule_takes_what_it_says() -> None:
    nothing = used(SHOWN, None, None)
    assert nothing.weight().all() and nothing.bias.all()
    linear = used(SHOWN, 0.01, None)
    assert linear.rows.tolist() == [False, False, True], "the output without the bias counts"
    assert linear.bias.tolist() == [False, True, True], "a constant output keeps its bias"
    assert linear.columns.tolist() == [False, True]
    activation = used(SHOWN, None, 0.001)
    assert activation.rows.tolist() == activation.bias.tolist() == [False, True, False]
    assert activation.columns.all()
    assert used(SHOWN, 0, 0).weight().tolist() == [[False, False], [False, True], [False, True]]


def test_without_a_bias_the_output_counts_alone() -> None:
    assert used(Uses(SHOWN.inputs, SHOWN.outputs), 0.01, 0.5).rows.tolist() == [False, True, True]


def test_more_leaves_as_thresholds_rise() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = Uses(*(torch.rand(n, generator=generator) for n in (30, 20, 20, 20)))
    left = [used(shown, t, t).weight() for t in (0, 0.1, 0.3, 1)]
    assert all((more >= less).all() and more.sum() > less.sum() for more, less in pairwise(left))
    assert not left[-1].any()
