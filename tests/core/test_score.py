"""Weight-only scores, against sums written out by hand."""

import torch

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.cost import CostModel, Group, Weight
from compresso.core.score import magnitude, parameters_per_unit

UP, DOWN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 2.0]])
CHANNELS = Axis("channels", Kind.CHANNEL, 3, (Slice("up", 0), Slice("down", 1)), (), "")
LAYERS = Axis("layers", Kind.LAYER, 2, (Slice("up", 0, unit=0), Slice("down", 0, unit=1)), (), "")


def test_magnitude_is_the_mean_square_of_a_units_entries() -> None:
    scores = magnitude([CHANNELS, LAYERS], {"up": UP, "down": DOWN})
    by_hand = [(1 + 4 + 1 + 1) / 4, (9 + 16 + 0 + 1) / 4, (0 + 1 + 4 + 4) / 4]
    torch.testing.assert_close(scores["channels"], torch.tensor(by_hand))
    torch.testing.assert_close(scores["layers"], torch.tensor([31 / 6, 11 / 6]))


def test_a_units_parameters_are_what_leaves_with_it() -> None:
    cost = CostModel([CHANNELS], [Weight("up", (3, 2), Group.BLOCKS), Weight("down", (2, 3), Group.BLOCKS)])
    assert parameters_per_unit([CHANNELS], cost) == {"channels": 4.0}
    one_less = {"channels": torch.tensor([1.0, 1.0, 0.0])}
    assert float(cost().blocks - cost(one_less).blocks) == 4.0
