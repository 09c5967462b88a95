"""One flat log-alpha behaves as separate gates per axis."""

import pytest
import torch

from compresso.core import hard_concrete
from compresso.core.axis import Axis, Kind
from compresso.core.gates import Gates

AXES = (Axis("layers.0.heads", Kind.HEAD, 3, (), (), ""), Axis("hidden", Kind.HIDDEN, 5, (), (), ""))


def gates() -> Gates:
    return Gates(AXES, {"layers.0.heads": torch.tensor([1.0, -2.0, 0.5]), "hidden": torch.linspace(-3, 3, 5)})


def test_split_follows_the_order_of_the_axes() -> None:
    one = gates()
    assert len(one) == 8
    parts = one.split(torch.arange(16.0).reshape(2, 8))
    assert parts["layers.0.heads"].tolist() == [[0, 1, 2], [8, 9, 10]]
    assert parts["hidden"].tolist() == [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]]


def test_probabilities_and_samples_are_those_of_each_axis_alone() -> None:
    one = gates()
    alone = torch.linspace(-3, 3, 5)
    assert torch.equal(one.keep_probabilities()["hidden"], hard_concrete.keep_probability(alone))
    u = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.sample(u)["hidden"], hard_concrete.sample(alone, u[:, 3:]))


def test_shift_clamps_to_the_published_range() -> None:
    one = gates()
    one.shift_(100.0)
    assert one.log_alpha.tolist() == pytest.approx([hard_concrete.LOG_ALPHA_HIGH] * 8)


def test_gradients_reach_the_one_parameter() -> None:
    one = gates()
    one.keep_probabilities()["layers.0.heads"].sum().backward()
    assert one.log_alpha.grad is not None
    assert (one.log_alpha.grad[:3] > 0).all()
    assert (one.log_alpha.grad[3:] == 0).all()


@pytest.mark.parametrize("initial", [{}, {"layers.0.heads": torch.zeros(3), "hidden": torch.zeros(4)}])
def test_missing_or_misshapen_initial_values_are_named(initial: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"gates of (layers.0.heads|hidden) want initial log-alpha \[\d\]"):
        Gates(AXES, initial)
