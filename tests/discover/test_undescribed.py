"""The law for models nobody described: units cut out of every tensor they own equal units masked at the axis' gates."""

import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from tests.discover.conftest import IDS, MODELS, Block, Toy, cut_, mask_, outputs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Olmo2Config, T5Config, T5ForConditionalGeneration

from compresso.core.axis import Kind
from compresso.discover.axes import discover
from compresso.discover.found import Discovery, Found, Owner
from compresso.errors import ArchError

Undescribed = Callable[[str], nn.Module]
PRE_NORM = ("gpt2", "opt", "gpt_neox", "vit", "gemma2", "phi3")


def found_in(model: nn.Module) -> Discovery:
    return discover(model, {"input_ids": IDS} if isinstance(model, Toy) else None)


def kinds(discovery: Discovery) -> dict[Kind, int]:
    return {kind: sum(found.kind == kind for found in discovery.found) for kind in Kind}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_block_has_its_axes(undescribed: Undescribed, name: str) -> None:
    counted = kinds(found_in(undescribed(name)))
    assert counted[Kind.CHANNEL] == 3
    assert counted[Kind.HEAD] == (0 if name == "toy" else 3)
    assert counted[Kind.HIDDEN] == (
        1 if name in ("toy", "phi3") else 0
    )  # LayerNorm, and Gemma's 1 + weight, cannot be folded
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
    assert [(piece.width, piece.start) for piece in found.axis.slices if piece.param == fused.param] == [
        (8, 0),
        (8, 32),
        (8, 64),
    ]
    interleaved = {f.name: f for f in found_in(undescribed("gpt_neox")).found}["layers.0.heads"]
    assert {owner.param.rsplit(".", 2)[1]: owner.width for owner in interleaved.owners} == {
        "query_key_value": 24,
        "dense": 8,
    }


def test_units_in_no_order_are_no_axis() -> None:
    shuffled = torch.tensor([1, 0, 2, 1, 0, 2])
    found = Found("layers.0.heads", Kind.HEAD, 3, (Owner("qkv.weight", 0, shuffled, ""),), (), (), "")
    with pytest.raises(ArchError, match=r"layers.0.heads: 'qkv.weight' holds its units in no order along dimension 0"):
        _ = found.axis


def test_what_stays_says_where_and_why(undescribed: Undescribed) -> None:
    fixed = {one.sources[0]: str(one) for one in found_in(undescribed("gpt2")).fixed}
    assert "transformer.h.0.ln_1 (native_layer_norm) it is averaged over" in fixed["transformer.wte.weight", 1]


class Mixing(nn.Module):
    """Two linears with something between them."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(8, 16), nn.Linear(16, 8), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(self.up(x)))


X = {"x": torch.zeros(1, 3, 8)}


@pytest.mark.parametrize("mix", [lambda x: x.cumsum(1), lambda x: x.sigmoid() * x])
def test_channels_that_are_not_mixed_can_leave(mix: Callable[[Tensor], Tensor]) -> None:
    (found,) = discover(Mixing(mix), X).found
    assert {(o.param, o.dim, o.width) for o in found.owners} == {
        ("up.weight", 0, 1),
        ("up.bias", 0, 1),
        ("down.weight", 1, 1),
    }
    assert (found.kind, found.size) == (Kind.CHANNEL, 16)


@pytest.mark.parametrize(
    ("mix", "why"),
    [
        (lambda x: x.softmax(-1), r"_softmax\) it is combined over"),
        (lambda x: x - x.mean(-1, keepdim=True), r"mean\) it is reduced over"),
        (lambda x: x / (x.square().mean(-1, keepdim=True) + 1).sqrt(), r"mean\) it is reduced over"),
        (lambda x: nn.functional.layer_norm(x, (16,)), r"layer_norm\) it is averaged over"),
        (lambda x: x * torch.linspace(0, 1, 16, device=x.device), r"mul\) it meets a table of fixed size"),
        (lambda x: torch.cat([x[..., :8], x[..., :8]], -1), "its units differ in size"),
        (lambda x: x[..., ::2].repeat_interleave(2, -1), "its units differ in size"),
        (
            lambda x: x.view(1, 3, 4, 4).transpose(-1, -2).softmax(-1).reshape(1, 3, 16),
            "whole rows or columns|combined over",
        ),
        (
            lambda x: (torch.ones(16, 16, device=x.device) @ x.transpose(1, 2)).transpose(1, 2),
            "multiplied by a fixed table",
        ),
        (lambda x: x @ (x.transpose(1, 2) @ x), "all its entries leave together|all units share it"),
    ],
)
def test_channels_that_are_mixed_stay(mix: Callable[[Tensor], Tensor], why: str) -> None:
    discovery = discover(Mixing(mix), X)
    reason = {source: str(fixed) for fixed in discovery.fixed for source in fixed.sources}["up.weight", 0]
    assert re.search(why, reason), reason


@pytest.mark.parametrize("operation", ["sort", "roll", "argsort"])
def test_an_unknown_operation_is_refused_by_name(operation: str) -> None:
    mixes = {
        "sort": lambda x: x.sort(dim=-1).values,
        "roll": lambda x: x.roll(1, -1),
        "argsort": lambda x: x.argsort(-1) * x,
    }
    with pytest.raises(ArchError, match=rf"^inner \({operation}\) is an operation nobody knows|^inner \(sort\)"):
        discover(nn.Sequential(OrderedDict(inner=Mixing(mixes[operation]))), {"input": X["x"]})


def test_a_forward_that_asks_for_values_is_refused() -> None:
    with pytest.raises(ArchError, match="cannot be traced without weights"):
        discover(Mixing(lambda x: x if x.sum() > 0 else -x), X)


def test_a_write_through_a_view_is_refused() -> None:
    def overwrites(x: Tensor) -> Tensor:
        x[..., :4].mul_(2)
        return x

    with pytest.raises(ArchError, match="written to under another name"):
        discover(Mixing(overwrites), X)


class Shifted(nn.Module):
    """A residual stream to which a parameter is added that no module's output could mask, before an RMSNorm that must
    be folded.
    """

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.embed, self.block, self.norm, self.head = (
            nn.Embedding(32, 24),
            Block(),
            nn.RMSNorm(24, eps=1e-2),
            nn.Linear(24, 32),
        )
        self.shift = nn.Parameter(torch.ones(24)) if shift else None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.norm(self.block(x if self.shift is None else x + self.shift)))


def test_a_norm_is_folded_only_behind_the_masks() -> None:
    assert kinds(discover(Shifted(False), {"input_ids": IDS}))[Kind.HIDDEN] == 1
    shifted = discover(Shifted(True), {"input_ids": IDS})
    assert kinds(shifted)[Kind.HIDDEN] == 0 and kinds(shifted)[Kind.CHANNEL] == 1


def test_heads_under_one_norm_of_all_queries_stay() -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Olmo2Config(**sizes))
    discovery = discover(model)
    assert kinds(discovery)[Kind.HEAD] == 0 and kinds(discovery)[Kind.HIDDEN] == 1
    assert any("q_norm (mean) it is averaged over" in str(fixed) for fixed in discovery.fixed)


class Several(Toy):
    """As the toy, with an attention and two FFNs, in a list of their own, in each layer."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(list(self.stack)):
            self.stack[i] = nn.ModuleDict({"mix": Attention(), "ffns": nn.ModuleList([layer, Block()])})

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.stack:
            parts = dict(layer.named_children())
            for part in (parts["mix"], *parts["ffns"].children()):
                x = part(x)
        return self.head(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read, self.write = nn.RMSNorm(24, eps=1e-2), nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.norm(x)).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
        seen = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.write(seen.transpose(1, 2).reshape(x.shape))


def test_a_layer_of_several_ffns_in_a_list_is_no_stage() -> None:
    """Its attention lies in no list inside, and the layers are those outside."""
    whole = {found.kind: found for found in found_in(Several()).found if found.whole}
    assert {kind: (found.container, found.size, len(found.gates)) for kind, found in whole.items()} == {
        Kind.LAYER: ("stack", 3, 9),
        Kind.ATTENTION: ("stack", 3, 3),
        Kind.MLP: ("stack", 3, 6),
    }


def test_parts_of_a_layer_in_a_list_are_no_layers() -> None:
    """T5's decoder lists two attentions and an FFN in each layer."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64)
        ).eval()
    found = discover(model, {"input_ids": IDS, "decoder_input_ids": IDS}).found
    assert {one.container for one in found if one.whole} == {"encoder.block", "decoder.block"}
