"""Channels of heads as units: of encoders alone, at equal counts, exact when they leave, and held by the stock class
where hidden dimensions leave in the same ratio.
"""

from pathlib import Path

import pytest
import torch
from tests.arch.conftest import CONFIGS
from tests.arch.test_laws import Tiny, logits
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.in_place import cut_moments_, same_parameters
from compresso.edit.removal import remove_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError
from compresso.formats.hf import save_checkpoint

ENCODERS = [name for name in CONFIGS if name.startswith(("bert", "roberta", "distilbert"))]


def described(model: PreTrainedModel) -> tuple[Axis, ...]:
    return axes_of(arch_for(model.config), model, (Kind.HEAD_CHANNEL,))


def narrowed(model: PreTrainedModel, share: float = 0.5, *, hidden: bool = True) -> dict[str, torch.Tensor]:
    """Masks that leave other channels in every head, and other dimensions, of each the same share."""
    generator = torch.Generator().manual_seed(1)
    masks: dict[str, torch.Tensor] = {}
    for axis in described(model):
        if axis.kind == Kind.HEAD_CHANNEL or (hidden and axis.kind == Kind.HIDDEN):
            left = torch.randperm(axis.size, generator=generator)[: round(share * axis.size)]
            masks[axis.name] = torch.zeros(axis.size).index_fill_(0, left, 1.0)
    return masks


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_units_only_where_they_are_asked_for_and_of_encoders(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch, axes = arch_for(model.config), described(model)
    inside = [axis for axis in axes if axis.kind == Kind.HEAD_CHANNEL]
    assert tuple(axis for axis in axes if axis not in inside) == arch.axes(model)
    heads = sum(shape.kv_heads for shape in arch.shapes(model))
    assert len(inside) == (2 * heads if name in ENCODERS else 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_is_smaller_and_counted(tiny: Tiny, name: str) -> None:
    """Whatever the width, and with what else may leave beside it."""
    model = tiny(name)
    arch, axes = arch_for(model.config), described(model)
    masks = narrowed(model)
    masks["layers.1.heads"] = torch.tensor([0.0, *[1.0] * (arch.shapes(model)[1].kv_heads - 1)])
    masks |= {unit: mask for unit, mask in masks.items() if not unit.startswith("layers.1.heads.0.")}
    expected = CostModel(axes, arch.weights(model)).of(Plan.from_masks(axes, masks)).total
    with gated(model, axes, masks):
        masked = logits(model)
    difference = remove_(model, axes, masks, range(4, 12), by="the test")
    smaller = logits(model)
    masked = masked if smaller.shape == masked.shape else masked[..., masks["hidden"].bool()]
    torch.testing.assert_close(smaller, masked, atol=2e-5, rtol=1e-4)
    assert difference < 1e-4 and int(expected) == sum(p.numel() for p in set(model.parameters()))


@pytest.mark.parametrize("name", ENCODERS)
def test_soft_masks_fold_into_queries_and_values(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    axes = described(model)
    generator = torch.Generator().manual_seed(2)
    soft = {
        unit: mask * (0.2 + 0.8 * torch.rand(mask.shape, generator=generator))
        for unit, mask in narrowed(model, hidden=False).items()
    }
    with gated(model, axes, soft):
        masked = logits(model)
    shrink_(model, axes, Plan.from_masks(axes, soft), soft)
    torch.testing.assert_close(logits(model), masked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_stock_class_holds_heads_as_narrow_as_the_stream(tiny: Tiny, name: str, tmp_path: Path) -> None:
    model = tiny(name)
    axes = described(model)
    heads = model.config.num_attention_heads
    remove_(model, axes, narrowed(model), range(4, 12), by="the test")
    assert model.config.num_attention_heads == heads
    assert save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out") == "uniform"
    opened = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(opened), logits(model))


def test_unequal_numbers_are_refused_and_nothing_is_changed(tiny: Tiny) -> None:
    model = tiny("bert")
    axes = described(model)
    before = logits(model)
    masks = narrowed(model)
    masks["layers.0.heads.1.values"][:] = 1
    with pytest.raises(ArchError, match=r"unequal numbers within the units of layers\.0\.heads"):
        shrink_(model, axes, Plan.from_masks(axes, masks))
    assert torch.equal(logits(model), before)


def test_moments_of_what_is_cut_are_those_of_the_smaller_model(tiny: Tiny) -> None:
    """AdamW's first step with betas of 0 holds gradients and their squares."""
    model = tiny("bert_classifier")
    axes, ids = described(model), torch.arange(4, 12)[None]
    masks = narrowed(model)
    plan = Plan.from_masks(axes, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    with gated(model, axes, masks):
        model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    cut_moments_(dict(optimizer.state), model, axes, plan)
    with same_parameters(model):
        shrink_(model, axes, plan)
    model.zero_grad()
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            state = optimizer.state[parameter]
            torch.testing.assert_close(state["exp_avg"], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
            torch.testing.assert_close(state["exp_avg_sq"], parameter.grad**2, rtol=1e-3, atol=1e-7, msg=name)
