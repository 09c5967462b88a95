"""Activations on few levels: patches that go on and off, and a range that is learned, from what is no padding."""

import pytest
import torch
from tests.edit.test_prefill import model_of

from compresso.core.quantisers import Quantiser, Style
from compresso.edit.patch import Patch
from compresso.edit.patches import patch_, read_patches, unpatch_, written
from compresso.edit.quantise_inputs import InputRounding, Inputs, quantise_inputs_
from compresso.errors import ArchError

IDS = torch.arange(1, 20).unsqueeze(0)
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
INPUTS = Inputs(4, Style.TEXTBOOK, (UP,), (DOWN,))
RANGES = torch.tensor([[-1.0, 2.0], [-0.5, 0.75]])


@torch.no_grad()
@pytest.mark.parametrize("ranges", [None, RANGES], ids=["token", "learned"])
def test_a_patch_goes_on_through_records_and_off_again(ranges: torch.Tensor | None) -> None:
    model = model_of("llama")
    dense = model(input_ids=IDS).logits
    seen: dict[str, torch.Tensor] = {}
    for name in (UP, DOWN):
        model.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0]}))
    patch = INPUTS.patch(ranges)
    (again,) = read_patches(written([patch])) if ranges is None else (patch,)
    patch_(model, [again])
    patch_(model, [again])  # a second time is no second rounding
    assert not torch.equal(model(input_ids=IDS).logits, dense)
    for i, name in enumerate((UP, DOWN)):
        tokens = seen[name].flatten(0, -2)
        if ranges is None:
            assert all(len(token.unique()) <= 16 for token in tokens) and len(tokens.unique()) > 16
        else:
            assert len(tokens.unique()) <= 16
            assert tokens.abs().max() <= ranges[i].abs().max() + 1e-6
    unpatch_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense)


@torch.no_grad()
def test_a_token_does_not_see_the_others() -> None:
    rounding = InputRounding(Quantiser(4))
    tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[1, 2] *= 50
    same = torch.ones(2, 5, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(rounding(tokens)[same], rounding(other)[same])


def test_a_learned_range_is_a_moving_average_that_evaluation_leaves() -> None:
    rounding = InputRounding(Quantiser(4), momentum=0.75).train()
    rounding(torch.tensor([[-1.0, 3.0]]))
    assert (float(rounding.low), float(rounding.high)) == (-1.0, 3.0)
    rounding(torch.tensor([[-5.0, 7.0]]))
    assert (float(rounding.low), float(rounding.high)) == (-2.0, 4.0)
    rounding.eval()(torch.tensor([[-50.0, 70.0]]))
    assert (float(rounding.low), float(rounding.high)) == (-2.0, 4.0)
    assert float(rounding(torch.tensor([[70.0]]))) == pytest.approx(4.0)


def test_padding_moves_no_learned_range() -> None:
    tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 3:] = False
    loud = tokens.masked_fill(~counted.unsqueeze(-1), 100.0)
    found: list[float] = []
    for given in (tokens, loud):
        rounding = InputRounding(Quantiser(4), momentum=0.9).train()
        rounding.counted = counted
        rounding(given)
        found.append(float(rounding.high))
    assert found[0] == found[1] == float(tokens[counted].max())


def test_what_nobody_wrote_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(ArchError, match=r"inputs of model\.layers\.9 cannot be rounded: the model has no such module"):
        quantise_inputs_(model, Inputs(4, Style.TEXTBOOK, ("model.layers.9",)))
    with pytest.raises(ArchError, match=r"ranges \[1, 2\] of rounded inputs; wanted \[2, 2\]"):
        quantise_inputs_(model, INPUTS, RANGES[:1])
    good = INPUTS.patch().params
    for wrong in ({"bits": 99}, {"bits": "4"}, {"style": "mine"}, {"symmetric": "up"}, {"asymmetric": [3]}):
        with pytest.raises(ArchError, match="use the version that wrote it"):
            Patch("quantise_inputs", {**good, **wrong}).apply_(model)
