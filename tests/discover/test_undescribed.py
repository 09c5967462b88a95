"""The law for models nobody described: units cut out of every tensor they own equal units masked at the axis' gates."""

from collections.abc import Callable

import pytest
import torch
from tests.discover.conftest import IDS, MODELS, cut_, mask_, outputs
from torch import nn

from compresso.core.axis import Kind
from compresso.discover.axes import Discovery, discover
from compresso.errors import ArchError

Undescribed = Callable[[str], nn.Module]
PRE_NORM = ("gpt2", "opt", "gpt_neox", "vit", "gemma2", "phi3")


def found_in(model: nn.Module) -> Discovery:
    return discover(model, {"input_ids": IDS} if type(model).__name__ == "Toy" else None)


def kinds(discovery: Discovery) -> dict[Kind, int]:
    return {kind: sum(found.kind == kind for found in discovery.found) for kind in Kind}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_block_has_its_axes(undescribed: Undescribed, name: str) -> None:
    counted = kinds(found_in(undescribed(name)))
    assert counted[Kind.CHANNEL] == 3
    assert counted[Kind.HEAD] == (0 if name == "toy" else 3)
    assert counted[Kind.HIDDEN] == (1 if name in ("toy", "phi3") else 0)  # LayerNorm, and Gemma's 1 + weight, cannot be folded
    assert counted[Kind.MLP] == 1 and counted[Kind.ATTENTION] == (0 if name == "toy" else 1)
    assert counted[Kind.LAYER] == (0 if name == "bert" else 1)  # BERT's norms stand behind the sum and stay


@pytest.mark.parametrize("name", sorted(MODELS))
def test_cut_equals_masked(undescribed: Undescribed, name: str) -> None:
    dense = outputs(undescribed(name))
    widths = [found for found in found_in(undescribed(name)).found if found.owners]
    assert widths
    for found in [f for f in widths if f.layer in (None, 1)]:
        mask = torch.ones(found.size)
        mask[[0, found.size // 2]] = 0
        if found.size < 3:
            mask[1] = 1
        cut = outputs(cut_(undescribed(name), found, mask.nonzero()[:, 0].tolist()))
        masked = outputs(mask_(undescribed(name), found, mask))
        torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-4)
        assert (masked - dense).abs().max() > 1e-2, f"masking {found.name} changed nothing"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_sub_layer_without_its_parameters_equals_a_masked_one(undescribed: Undescribed, name: str) -> None:
    dense = outputs(undescribed(name))
    for found in [found for found in found_in(undescribed(name)).found if found.whole]:
        mask = torch.ones(found.size)
        mask[1] = 0
        masked = outputs(mask_(undescribed(name), found, mask))
        without = undescribed(name)
        with torch.no_grad():
            for part in found.whole:
                if part.unit == 1:
                    without.get_parameter(part.param).zero_()
        torch.testing.assert_close(outputs(without), masked, rtol=1e-4, atol=1e-4)
        assert (masked - dense).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*PRE_NORM, "toy"])
def test_a_masked_layer_equals_a_deleted_one(undescribed: Undescribed, name: str) -> None:
    found = next(found for found in found_in(undescribed(name)).found if found.kind == Kind.LAYER)
    assert {part.param for part in found.whole} == {
        p for p, _ in undescribed(name).named_parameters() if p.startswith(found.container + ".")
    }
    mask = torch.ones(3)
    mask[2] = 0
    shorter = undescribed(name)
    if hasattr(shorter, "config"):
        shorter.config.num_hidden_layers = 2
    del shorter.get_submodule(found.container)[2]  # type: ignore[attr-defined]
    torch.testing.assert_close(outputs(shorter), outputs(mask_(undescribed(name), found, mask)), rtol=1e-4, atol=1e-4)


def test_fused_projections_are_owned_block_by_block(undescribed: Undescribed) -> None:
    found = {f.name: f for f in found_in(undescribed("gpt2")).found}["layers.0.heads"]
    fused = next(owner for owner in found.owners if owner.param.endswith("c_attn.weight"))
    assert fused.dim == 1 and fused.width is None
    assert fused.unit_of.tolist() == [index % 32 // 8 for index in range(96)]
    with pytest.raises(ArchError, match=r"layers.0.heads: .*c_attn.* in several places"):
        _ = found.axis
    interleaved = {f.name: f for f in found_in(undescribed("gpt_neox")).found}["layers.0.heads"]
    assert {owner.param.rsplit(".", 2)[1]: owner.width for owner in interleaved.owners} == {"query_key_value": 24, "dense": 8}


def test_what_stays_says_where_and_why(undescribed: Undescribed) -> None:
    fixed = {one.sources[0]: str(one) for one in found_in(undescribed("gpt2")).fixed}
    assert "transformer.h.0.ln_1 (native_layer_norm) it is averaged over" in fixed["transformer.wte.weight", 1]
