"""The loss of candidates is that of the model at their levels, which is dense again afterwards, whatever happened."""

import math

import pytest
import torch
from tests.sweep.test_bank import llama
from transformers import PreTrainedModel

from compresso.errors import NumericError
from compresso.solve.level_choice import Levels
from compresso.sweep.candidate_loss import candidate_loss

AT = (0, 0, 2)
"""Two items lie in the first block, one in the last."""


class Switches:
    """Notes how a model's blocks are put at levels."""

    def __init__(self) -> None:
        self.now: dict[int, Levels] = {0: (0, 0), 2: (0,)}
        self.calls: list[int] = []

    def __call__(self, block: int, levels: Levels, /) -> None:
        self.now[block] = levels
        self.calls.append(block)

    def loss(self, model: PreTrainedModel) -> float:
        assert not model.training
        if self.now[2] == (9,):
            raise NumericError("it overflows")
        return sum(10.0**block * n for block, levels in self.now.items() for n in levels)


def test_candidates_are_the_model_at_their_levels_and_it_is_dense_afterwards() -> None:
    model, switches = llama().train(), Switches()
    with candidate_loss(model, AT, switches, (0, 0, 0), switches.loss) as fitness:
        assert fitness((0, 0, 0), 0) == 0 and switches.calls == []
        assert fitness((1, 2, 0), 0) == 3 and switches.calls == [0]
        assert fitness((1, 2, 4), 0) == 403 and switches.calls == [0, 2]
        assert math.isnan(fitness((1, 2, 9), 0))
        assert fitness((0, 0, 4), 0) == 400
    assert switches.now == {0: (0, 0), 2: (0,)} and model.training


def test_the_model_is_dense_after_an_error() -> None:
    model, switches = llama(), Switches()
    with (
        pytest.raises(KeyError),
        candidate_loss(model, AT, switches, (0, 0, 0), lambda _: {}["nothing"]) as fitness,
    ):
        fitness((1, 1, 1), 0)
    assert switches.now == {0: (0, 0), 2: (0,)} and not model.training and torch.is_grad_enabled()
