"""The check after every removal: a planted fault is caught, and roundings that a model magnifies are none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.arch.conftest import CONFIGS, MIXTURES
from tests.arch.conftest import tiny as tiny
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.edit import removal
from compresso.edit.removal import remove_
from compresso.edit.rounding import full_precision, rounding_of
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError


def without_some(
    model: PreTrainedModel, kinds: Sequence[Kind] = (Kind.CHANNEL,)
) -> tuple[Any, dict[str, torch.Tensor]]:
    """All axes of a model, and masks that switch off every third unit of those of some kinds."""
    axes = arch_for(model.config).axes(model)
    chosen = [axis for axis in axes if axis.kind in kinds]
    return axes, {axis.name: torch.tensor([float(i % 3 != 1) for i in range(axis.size)]) for axis in chosen}


def of_the_neighbour(
    model: PreTrainedModel, axes: Sequence[Axis], plan: Plan, soft: Mapping[str, torch.Tensor]
) -> None:
    """A faulty surgery: the last axis keeps the units before some of those it should."""
    name, kept = list(plan.kept.items())[-1]
    wrong = tuple(i - 1 if i % 3 == 2 else i for i in kept)
    shrink_(model, axes, Plan({**plan.kept, name: wrong}), soft)


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_units_are_caught_on_every_architecture(
    name: str, tiny: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    axes, masks = without_some(model, (Kind.EXPERT_CHANNEL if name in MIXTURES else Kind.CHANNEL,))
    assert remove_(tiny(name), axes, masks) < 1e-4
    monkeypatch.setattr(removal, "shrink_", of_the_neighbour)
    with pytest.raises(NumericError, match=r"the plan: the smaller model's logits differ .* \(roundings move them by"):
        remove_(model, axes, masks)


def magnifier() -> LlamaForCausalLM:
    """A model whose sharp attention magnifies roundings, as some trained ones do."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        vocab_size=128,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
    return model


def test_roundings_that_a_model_magnifies_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = magnifier()
    axes, masks = without_some(model, (Kind.HEAD, Kind.CHANNEL))
    masks = {name: mask * 0.7 for name, mask in masks.items()}  # folded into weights, which rounds them anew
    with torch.no_grad():
        largest = float(model(torch.arange(64)[None]).logits.abs().max())
    usual = 1e3 * torch.finfo(torch.float32).eps * largest
    assert remove_(magnifier(), axes, masks) > usual, "the model magnifies too little for this test to say anything"
    monkeypatch.setattr(removal, "shrink_", of_the_neighbour)
    with pytest.raises(NumericError):
        remove_(model, axes, masks)


def test_what_the_roundings_of_a_linear_move_is_found() -> None:
    """Of one linear of unit weights, the noise itself: one rounding of the row's root mean square at most."""
    linear = torch.nn.Linear(8, 4, bias=False)
    torch.nn.init.ones_(linear.weight)
    given = torch.ones(1, 8)
    found = rounding_of(linear, lambda: linear(given), linear(given))
    assert 0 < found <= 8 * torch.finfo(torch.float32).eps * 1.01
    assert not linear._forward_hooks


def test_products_are_of_float32_inside_and_as_before_after() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_removal_computes_in_full_precision(tiny: Callable[[str], PreTrainedModel]) -> None:
    model, seen = tiny("llama_gqa"), []
    model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        axes, masks = without_some(model)
        remove_(model, axes, masks)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
