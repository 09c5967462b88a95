"""A closed layer gate leaves its layer dense whatever the unit masks say."""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.edit.gate import gated
from compresso.edit.layer_gates import effective_mask


def test_closed_gates_give_the_dense_model(make: Callable[..., LlamaForCausalLM]) -> None:
    model = make()
    axes = arch_for(model.config).axes(model)
    ids = torch.arange(2, 9)[None]
    units = {
        axis.name: torch.rand(axis.size, generator=torch.Generator().manual_seed(0))
        for axis in axes
        if axis.layer is not None
    }
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for gate, same in ((0.0, True), (0.49, True), (0.51, False), (1.0, False)):
            masks = {name: effective_mask(mask, torch.tensor(gate)) for name, mask in units.items()}
            with gated(model, axes, masks):
                assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-6) == same


def test_open_gates_apply_the_unit_mask_and_gradients_pass_through() -> None:
    mask = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    gate = torch.tensor(0.7, requires_grad=True)
    result = effective_mask(mask, gate)
    assert torch.equal(result, mask)
    result.sum().backward()
    assert gate.grad is not None and mask.grad is not None
    assert torch.equal(gate.grad, torch.tensor(-1.75)) and torch.equal(mask.grad, torch.ones(3))
