"""Rounded activations: the grid, gradients, and a patch that goes on and off."""

import pytest
import torch
from tests.edit.test_prefill import model_of

from compresso.edit.patches import patch_, read_patches, unpatch_
from compresso.edit.round_inputs import round_inputs_, round_inputs_patch, rounded
from compresso.errors import ArchError

IDS = torch.arange(1, 20).unsqueeze(0)


def test_a_token_s_largest_entry_stays_and_others_move_by_half_a_step_at_most() -> None:
    inputs = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    step = inputs.abs().amax(dim=-1, keepdim=True) / 127
    found = rounded(inputs, "token")
    assert bool(((found - inputs).abs() <= step * 0.5001).all())
    assert bool(((found / step) - (found / step).round()).abs().max() < 1e-3)
    shared = rounded(inputs, "tensor")
    assert len((shared / (inputs.abs().max() / 127)).round().unique()) <= 255
    assert torch.equal(rounded(torch.zeros(2, 4), "token"), torch.zeros(2, 4))


def test_gradients_pass_through() -> None:
    inputs = torch.randn(4, 8, requires_grad=True)
    (rounded(inputs, "token") * 3).sum().backward()
    torch.testing.assert_close(inputs.grad, torch.full((4, 8), 3.0))


@torch.no_grad()
def test_the_patch_goes_on_and_off_once() -> None:
    model = model_of("llama")
    dense = model(input_ids=IDS).logits
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    seen: list[torch.Tensor] = []
    linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    patch_(model, [round_inputs_patch("token", ["model.layers.1.mlp.up_proj"])])
    patch_(model, [round_inputs_patch("token", ["model.layers.1.mlp.up_proj"])])  # a second time is no second rounding
    changed = model(input_ids=IDS).logits
    torch.testing.assert_close(seen[0], rounded(seen[0], "token"))
    assert len((seen[0][0, 0] / (seen[0][0, 0].abs().max() / 127)).round().unique()) <= 32
    assert 0 < float((changed - dense).abs().max()) < 0.2
    unpatch_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(
        ArchError, match=r"inputs of model\.layers\.9\.mlp cannot be rounded: the model has no such module"
    ):
        round_inputs_(model_of("llama"), "token", ["model.layers.9.mlp"])
    with pytest.raises(ArchError, match="forward patch 'round_inputs row' is unknown"):
        patch_(model_of("llama"), read_patches(["round_inputs row"]))
