"""Roundings on a live model: Q(M * W) is what it computes with, gradients reach the full weights that are left, and
folding leaves plain linears that compute the same.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.core.quantisers import Quantiser, Style
from compresso.edit.gate import gated
from compresso.edit.magnitude_masks import ends, owned, unit_masks, weight_masks
from compresso.edit.quantise_inputs import Inputs
from compresso.edit.quantised import QuantisedModel
from compresso.sweep.targets import Where, chosen, matrix, names_of

IDS = torch.arange(1, 20).unsqueeze(0)
NONE = Inputs(16, Style.TEXTBOOK, ())


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, intermediate_size=48)),
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def linears_of(model: PreTrainedModel) -> list[str]:
    return names_of(chosen(model, arch_for(model.config), Where()))


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def rounded(model: PreTrainedModel, bits: int = 4, masked: Sequence[str] = (), whole: bool = False) -> QuantisedModel:
    return QuantisedModel(model, linears_of(model), Quantiser(bits), NONE, whole=whole, masked=masked)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_rounded_while_it_learns_and_once_folded(family: str) -> None:
    """GPT-2's linears are stored the other way round."""
    model = model_of(family)
    before = copy.deepcopy(model)
    on = rounded(model.requires_grad_(True))
    live = logits(model)
    live.square().mean().backward()
    for name in linears_of(before):
        expected = Quantiser(4)(matrix(before, name))
        torch.testing.assert_close(matrix(model, name), expected, rtol=0, atol=0)
        assert all(len(row.unique()) <= 15 for row in expected)
        full = on.full[f"{name}.weight"]
        assert torch.equal(full.detach(), before.get_parameter(f"{name}.weight")) and bool(full.grad.any())  # type: ignore[union-attr]
    on.fold_()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert not [name for name, _ in model.named_modules() if "parametrizations" in name or "compresso" in name]
    assert torch.equal(logits(model), live)


def test_16_bits_change_no_bit() -> None:
    model = model_of("llama")
    before = logits(model)
    on = rounded(model, 16)
    assert torch.equal(logits(model), before)
    on.fold_()
    assert torch.equal(logits(model), before)


def test_a_scale_for_a_matrix_is_coarser_than_one_for_a_row() -> None:
    model = model_of("llama")
    name = linears_of(model)[0]
    exact = matrix(model, name).clone()
    on = rounded(model, whole=True)
    assert len(matrix(model, name).unique()) <= 15
    far = float((matrix(model, name) - exact).abs().mean())
    on.fold_()
    assert far > float((Quantiser(4)(exact) - exact).abs().mean())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_was_masked_is_exactly_0_and_learns_nothing(bits: int) -> None:
    """Q(M * W), whatever becomes of the full weight; zeros that were there stay, too."""
    model = model_of("llama").requires_grad_(True)
    names = [f"{name}.weight" for name in linears_of(model)]
    with torch.no_grad():
        model.get_parameter(names[0])[:, :3] = 0
    on = rounded(model, bits, masked=names[1:])
    on.keep_(weight_masks(on.full, names[1:], 0.3))
    logits(model).square().mean().backward()
    optimizer = torch.optim.AdamW(list(on.full.values()), lr=1e-2, weight_decay=0.1)
    optimizer.step()
    kept = on.kept()
    assert on.pruned and list(kept) == names
    for name, mask in kept.items():
        gradient = on.full[name].grad
        assert gradient is not None and not gradient[~mask].any()
        assert not mask.all() and (name == names[0] or int(mask.sum()) == -(-3 * mask.numel() // 10))
    on.fold_()
    for name, mask in kept.items():
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("kind", [Kind.CHANNEL, Kind.HEAD])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_pruned_rows_and_heads_compute_as_removed_ones(family: str, kind: Kind) -> None:
    """With 16 bits, so that pruning alone is seen; biases of what leaves go, too."""
    model = model_of(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind == kind]
    masks = unit_masks(dict(model.named_parameters()), axes, 0.4)
    of_units: dict[str, Tensor] = {}
    for axis in axes:
        ((reader, *_),) = [ends(axis)[1]]
        rows = masks[reader.param].movedim(reader.dim, 0).flatten(1)[:: reader.width, 0]
        of_units[axis.name] = rows.float()
        assert int(rows.sum()) == -(-2 * axis.size // 5)
    with torch.no_grad(), gated(model, axes, of_units):
        wanted = logits(model)
    on = rounded(model, 16, masked=owned(axes))
    on.keep_(masks)
    on.fold_()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_an_ffn_are_ranked_by_what_writes_them_and_heads_by_what_reads_them() -> None:
    model = model_of("bert")
    axes = {axis.name: axis for axis in arch_for(model.config).axes(model)}
    written, read = ends(axes["layers.0.channels"])
    assert [piece.param.split("layer.0.")[1] for piece in written] == ["intermediate.dense.weight"]
    assert [piece.param.split("layer.0.")[1] for piece in read] == ["output.dense.weight"]
    with torch.no_grad():
        model.get_parameter(written[0].param)[3] = 9.0
        model.get_parameter(ends(axes["layers.0.heads"])[1][0].param)[:, 8:16] = 9.0
    masks = unit_masks(dict(model.named_parameters()), [axes["layers.0.channels"], axes["layers.0.heads"]], 0.01)
    assert masks[written[0].param].any(dim=1).nonzero().flatten().tolist() == [3]
    queries = next(mask for name, mask in masks.items() if name.endswith("query.weight"))
    assert queries.any(dim=1).nonzero().flatten().tolist() == list(range(8, 16))


def test_the_largest_stay() -> None:
    weight = torch.tensor([[4.0, -1.0, 0.5], [-3.0, 2.0, 0.1]])
    assert weight_masks({"w": weight}, ["w"], 0.5)["w"].tolist() == [[True, False, False], [True, True, False]]
    assert int(weight_masks({"w": weight}, ["w"], 0.51)["w"].sum()) == 4  # the next whole number
