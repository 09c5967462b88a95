"""Units in another order compute the same, for every axis whose units tile their tensors."""

import pytest
import torch
from tests.arch.conftest import ALL_HEADS, CONFIGS, GROUPED, MIXTURES
from tests.arch.conftest import tiny as tiny  # the fixture
from tests.arch.test_laws import Tiny, described, logits

from compresso.core.axis import Kind
from compresso.edit.reorder import reorder_


@pytest.mark.parametrize("kind", [Kind.CHANNEL, Kind.HEAD])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_another_order_changes_nothing(tiny: Tiny, name: str, kind: Kind) -> None:
    model = tiny(name)
    _, axes = described(model)
    before, changed = logits(model), 0
    for axis in axes:
        if axis.kind == kind and axis.size > 1:
            weight = model.get_parameter(axis.slices[0].param).clone()
            reorder_(model, axis, torch.arange(axis.size).flip(0))
            changed += not torch.equal(weight, model.get_parameter(axis.slices[0].param))
    dense = 4 if name not in MIXTURES else len([axis for axis in axes if axis.kind == Kind.CHANNEL])
    assert changed == (0 if kind == Kind.HEAD and name in ALL_HEADS else 4 if kind == Kind.HEAD else dense)
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_may_have_their_channels_in_any_order(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    before = logits(model)
    mixed = [axis for axis in described(model)[1] if axis.kind == Kind.EXPERT_CHANNEL]
    for axis in mixed:
        weight = model.get_parameter(axis.slices[-1].param).clone()
        reorder_(model, axis, torch.arange(axis.size).flip(0))
        assert not torch.equal(weight, model.get_parameter(axis.slices[-1].param))
    assert mixed
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_query_heads_of_one_key_value_head_may_change_places(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    before = logits(model)
    axis = next(axis for axis in described(model)[1] if axis.name == "layers.2.heads.1.queries")
    weights = [model.get_parameter(piece.param).clone() for piece in axis.slices]
    reorder_(model, axis, torch.arange(axis.size).flip(0))
    for piece, weight in zip(axis.slices, weights, strict=True):
        changed = (weight != model.get_parameter(piece.param)).flatten(1) if weight.dim() > 1 else None
        assert changed is None or 0 < int(changed.any(dim=1 - piece.dim).sum()) <= axis.size * piece.width
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)


def test_an_order_that_is_none_is_refused(tiny: Tiny) -> None:
    model = tiny("llama_gqa")
    axis = described(model)[1][0]
    with pytest.raises(ValueError, match=r"the order of layers\.0\.heads does not name each of its 2 units once"):
        reorder_(model, axis, [0, 0])
