"""SegFormer under the laws: masked is smaller, counted is predicted and in closed form, multiply-accumulates are what
hooks see; what a residual sum adds shares an index set, a unit's own convolution sends no bias on; discovered axes are
the described ones; what a config cannot say is refused in a line.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.test_mobilevit import drawn, hooked
from torch import nn
from transformers import (
    PreTrainedModel,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

from compresso.arch.base import arch_for
from compresso.arch.outputs import any_input, outputs
from compresso.arch.segformer import SegFormer
from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import open_source
from compresso.commands.inspect import inspect
from compresso.core.axis import Axis, Kind
from compresso.core.cost import CostModel, Group
from compresso.core.loss import PIXEL
from compresso.core.plan import Plan
from compresso.discover.axes import discover
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, CheckpointError, ExportError
from compresso.formats.hf import save_checkpoint
from compresso.native import SEGFORMER_CLASSES
from compresso.observe.gate_taylor import gate_taylor

SIZES: dict[str, Any] = {
    "image_size": [36, 44],  # feature maps of odd sides, which the smaller maps of attentions do not divide
    "hidden_sizes": [8, 12, 20, 16],
    "num_attention_heads": [1, 2, 5, 4],
    "sr_ratios": [3, 2, 2, 1],
    "depths": [2, 3, 2, 2],
    "mlp_ratios": [4, 2, 3, 4],
    "decoder_hidden_size": 24,
    "num_labels": 5,
}
CLASSES: dict[str, type[PreTrainedModel]] = {
    "classifier": SegformerForImageClassification,
    "segmenter": SegformerForSemanticSegmentation,
    "bare": SegformerModel,
}


def made(name: str, **fields: Any) -> PreTrainedModel:
    """Random weights, biases and statistics of batch norms, so that what a dead unit sends on shows."""
    draw = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        model = CLASSES[name](SegformerConfig(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, 1.3 / tensor[0].numel() ** 0.5, generator=draw)
            elif tensor_name.endswith(("norm.weight", "running_var", "_before.weight", "_after.weight")):
                tensor.uniform_(0.6, 1.4, generator=draw)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.5, 0.5, generator=draw)
    return model


@pytest.fixture(params=sorted(CLASSES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return made(request.param)


def kinds_of(name: str) -> Callable[[Axis], bool]:
    whole = (Kind.LAYER, Kind.ATTENTION, Kind.MLP)
    return {
        "heads": lambda axis: axis.kind == Kind.HEAD,
        "ffn": lambda axis: axis.name.endswith("channels"),
        "features": lambda axis: axis.kind == Kind.HIDDEN,
        "head": lambda axis: axis.name.startswith("head."),
        "layers": lambda axis: axis.kind == Kind.LAYER,
        "sub-layers": lambda axis: axis.kind in (Kind.ATTENTION, Kind.MLP),
        "units": lambda axis: axis.kind not in whole,
        "all": lambda axis: True,
    }[name]


@pytest.mark.parametrize("kind", ["heads", "ffn", "features", "head", "layers", "sub-layers", "units", "all"])
@pytest.mark.parametrize("soft", [False, True])
def test_masked_is_smaller_and_counted_is_predicted(model: PreTrainedModel, kind: str, soft: bool) -> None:
    arch, given = arch_for(model.config), any_input(model.config)
    axes = tuple(filter(kinds_of(kind), arch.axes(model)))
    assert isinstance(arch, SegFormer)
    if not axes:
        assert kind == "head" and not hasattr(model, "decode_head")
        return
    masks = drawn(axes, soft=soft)
    whole = outputs(model, given)
    with gated(model, axes, masks):
        masked = outputs(model, given)
    plan = Plan.from_masks(axes, masks)
    predicted = CostModel(arch.axes(model), arch.weights(model)).of(plan)
    shrink_(model, axes, plan, masks if soft else None)
    torch.testing.assert_close(outputs(model, given), masked, rtol=0, atol=2e-5 * float(whole.abs().max().clamp(min=1)))
    assert float((whole - masked).abs().max()) > 1e-2
    assert int(predicted.total) == sum(parameter.numel() for parameter in model.parameters())
    counted = CostModel(arch.axes(model), arch.weights(model))()
    assert int(counted.total) == int(predicted.total) and int(counted.macs) == int(predicted.macs) == hooked(model)


def test_a_mask_before_a_units_own_convolution_is_no_removal() -> None:
    """Its bias goes through the activation; the gate behind it is one."""
    model, given = made("segmenter"), any_input(SegformerConfig(**SIZES))
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.name.endswith("channels")]
    masks = drawn(tuple(axes), soft=False)
    with gated(model, axes, masks):
        masked = outputs(model, given)
    hooks = [
        model.get_submodule(f"{axis.container}.fc1").register_forward_hook(
            lambda _, __, output, mask=masks[axis.name]: output * mask
        )
        for axis in axes
    ]
    before = outputs(model, given)
    for hook in hooks:
        hook.remove()
    assert float((before - masked).abs().max()) > 1e-2


def test_multiply_accumulates_are_those_that_hooks_see(model: PreTrainedModel) -> None:
    arch = arch_for(model.config)
    assert int(CostModel(arch.axes(model), arch.weights(model))().macs) == hooked(model)


def test_a_published_model_has_its_size_in_closed_form() -> None:
    """nvidia/segformer-b0 for ADE20K: 3.8 M parameters and 8.4 GFLOPs at 512 x 512 (arXiv 2105.15203, table 1a), which
    counts attention scores and norms, too.
    """
    config = SegformerConfig(num_labels=150, image_size=512)
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(config)
    arch = arch_for(config)
    counted = CostModel(arch.axes(model), arch.weights(model))()
    blocks = 0
    numbers = zip(config.hidden_sizes, (3, *config.hidden_sizes), (7, 3, 3, 3), config.sr_ratios, strict=False)
    for d, read, patch, ratio in numbers:
        embedding = d * read * patch**2 + d
        attention = 4 * (d * d + d) + (d * d * ratio**2 + d if ratio > 1 else 0)
        ffn = 4 * d * d + 4 * d + 9 * 4 * d + 4 * d + 4 * d * d + d
        blocks += embedding + 2 * (attention + ffn) + (256 * d + 256)
    blocks += 4 * 256 * 256 + 150 * 256 + 150
    assert int(counted.blocks) == blocks and int(counted.total) == 3_752_694
    assert int(counted.total) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(w.macs > 0 for w in arch.weights(model) if w.group == Group.NORMS) == 0
    assert 6.5e9 < float(counted.macs) < 8.4e9


def test_residual_sums_share_an_index_set_and_the_smaller_maps_do() -> None:
    model = made("segmenter")
    axes = {axis.name: axis for axis in arch_for(model.config).axes(model)}
    features = axes["stages.1.features"]
    written = {piece.param for piece in features.slices if piece.dim == 0}
    read = {piece.param for piece in features.slices if piece.dim == 1}
    stage = "segformer.stages.1"
    for k in range(3):
        reduction = f"{stage}.blocks.{k}.attention.sequence_reduction.sequence_reduction.weight"
        assert {reduction, f"{stage}.blocks.{k}.attention.o_proj.bias", f"{stage}.blocks.{k}.mlp.fc2.weight"} <= written
        assert {reduction, f"{stage}.blocks.{k}.attention.k_proj.weight"} <= read
    assert {"segformer.stages.2.patch_embeddings.proj.weight", "decode_head.linear_projections.1.proj.weight"} <= read
    assert f"{stage}.layer_norm" in features.layer_norms and len(features.layer_norms) == 2 + 3 * 3
    assert "stages.0.layers.0.heads" not in axes  # one head alone


def facts(axes: tuple[Axis, ...]) -> set[tuple[object, ...]]:
    slices = lambda axis: tuple(  # noqa: E731
        sorted((s.param, s.dim, s.width, -1 if s.unit is None else s.unit, s.start) for s in axis.slices)
    )
    gates = lambda axis: {(g.module, g.side, g.width, g.unit, g.start, g.of) for g in axis.gates}  # noqa: E731
    return {(axis.kind, axis.size, axis.min_units, slices(axis), frozenset(gates(axis))) for axis in axes}


def test_discovered_axes_are_the_described_ones(model: PreTrainedModel) -> None:
    with torch.device("meta"):
        shaped = type(model)(SegformerConfig(**{**SIZES, "image_size": 64}))
    # a trace does not know that norms may take their statistics over what is left
    described = tuple(axis for axis in arch_for(shaped.config).axes(shaped) if not axis.layer_norms)
    assert facts(discover(shaped).axes) == facts(described)


def test_masks_of_examples_are_masks_one_by_one() -> None:
    model = made("segmenter")
    axes = arch_for(model.config).axes(model)
    given = torch.cat([any_input(model.config), any_input(model.config).flip(-1)])
    one, two = drawn(axes, 1), drawn(axes, 2)
    with torch.no_grad(), gated(model, axes, {name: torch.stack([one[name], two[name]]) for name in one}):
        both = model(pixel_values=given).logits
    for i, masks in enumerate((one, two)):
        with torch.no_grad(), gated(model, axes, masks):
            torch.testing.assert_close(model(pixel_values=given[i : i + 1]).logits[0], both[i], rtol=1e-4, atol=1e-4)


def test_scores_predict_what_dimming_a_unit_does() -> None:
    model = made("segmenter").double()
    axes = [axis for axis in arch_for(model.config).axes(model) if kinds_of("units")(axis)][-8:]
    given = any_input(model.config).double()
    batch = {"pixel_values": given, "labels": torch.randint(5, (1, 36, 44), generator=torch.Generator().manual_seed(0))}
    scores = gate_taylor(model, axes, [batch], loss=PIXEL)
    for axis in axes:
        unit, losses = int(scores[axis.name].argmax()), list[float]()
        for value in (0.9999, 1.0001):
            mask = torch.ones(axis.size, dtype=torch.float64)
            mask[unit] = value
            with torch.no_grad(), gated(model, axes, {axis.name: mask}):
                losses.append(float(PIXEL(model, batch)))
        assert float(scores[axis.name][unit]) == pytest.approx(((losses[1] - losses[0]) / 0.0002) ** 2, rel=5e-2)


def test_a_result_that_a_stock_config_holds_is_stock(tmp_path: Path) -> None:
    model = made("segmenter")
    arch, given = arch_for(model.config), any_input(model.config)
    width = {f"stages.{i}.layers.{k}.channels": w for i, w in enumerate((8, 12, 20, 16)) for k in range(3)}
    keep = {axis.name: width.get(axis.name, 12) for axis in arch.axes(model) if axis.kind == Kind.CHANNEL}
    keep |= {"stages.1.layers": 2}
    shrink_(model, arch.axes(model), Plan({name: tuple(range(n)) for name, n in keep.items()}))
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "small") == "uniform"
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "small").eval()
    assert (again.config.mlp_ratios, again.config.depths) == ([1, 1, 1, 1], [2, 2, 2, 2])
    assert again.config.decoder_hidden_size == 12
    torch.testing.assert_close(outputs(again, given), outputs(model, given))


def test_a_result_that_no_stock_config_holds_is_refused_as_one(tmp_path: Path) -> None:
    model = made("segmenter")
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan({"stages.1.layers.0.channels": (0, 1, 2)}))
    with pytest.raises(ExportError, match=r"layout uniform cannot hold this segformer: .*mlp.*Use layout native\.$"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "odd", layout="uniform")
    assert not (tmp_path / "odd").exists()
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "odd") == "native"
    assert type(open_source(tmp_path / "odd").config) is SEGFORMER_CLASSES["segformer"][0]


def test_the_size_of_pictures_is_the_processors(tmp_path: Path) -> None:
    """Published configs say 224, beside a processor that brings pictures to 512."""
    made("segmenter", image_size=224).save_pretrained(tmp_path)
    assert inspect(tmp_path)["macs_of"] == "picture"
    processor = tmp_path / "preprocessor_config.json"
    for written, size in (("48", 48), ('{"height": 36, "width": 44}', [36, 44]), ('{"shortest_edge": 9}', 224)):
        processor.write_text(f'{{"size": {written}, "do_normalize": false, "do_reduce_labels": true}}')
        source = open_source(tmp_path)
        assert source.config.image_size == size
    assert (pixel_input(source).height, pixel_input(source).width) == (224, 224)


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    fields = {name: value for name, value in SIZES.items() if name != "image_size"}
    SegformerForSemanticSegmentation(SegformerConfig(**fields)).save_pretrained(tmp_path)
    said = r'runs at any size of pictures, and nothing says which. Write it into config.json, such as "image_size"'
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path)
    with torch.device("meta"):
        sizeless = SegformerForSemanticSegmentation(SegformerConfig(**fields))
        flat = SegformerForSemanticSegmentation(SegformerConfig(**SIZES, reshape_last_stage=False))
    with pytest.raises(ArchError, match="this SegFormer's config has no image_size"):
        arch_for(sizeless.config).weights(sizeless)
    sizeless.config.image_size = [40, 8]
    with pytest.raises(
        ArchError, match=r"stage 0 has feature maps of 10 x 2 places, and its sr_ratios want at least 3"
    ):
        arch_for(sizeless.config).weights(sizeless)
    with pytest.raises(ArchError, match=r"reshape_last_stage=False: .*; set it to true in config.json"):
        arch_for(flat.config).axes(flat)
    other: Any = nn.Linear(2, 2)
    other.config = flat.config
    with pytest.raises(ArchError, match="Linear has no stages; load it with a stock class of SegFormer"):
        arch_for(flat.config).axes(other)


def test_a_size_of_nothing_is_refused(tmp_path: Path) -> None:
    made("bare").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 0, "do_normalize": false}')
    with pytest.raises(CheckpointError, match=r"image_size=0; wanted a number of pixels, or height and width"):
        pixel_input(open_source(tmp_path))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"depths": [2, 2]},
            r"depths=\[2, 2\] of 4 stages \(num_encoder_blocks\); wanted a number for each, at least 0",
        ),
        (
            {"hidden_sizes": [16, 16, 24, 32, 40]},
            r"hidden_sizes=\[16, 16, 24, 32, 40\] of 4 stages \(num_encoder_blocks\); wanted a number for each",
        ),
        ({"mlp_ratios": [4, 4, 4]}, r"mlp_ratios=\[4, 4, 4\] of 4 stages \(num_encoder_blocks\); wanted a number for"),
        ({"strides": [0, 2, 2, 2]}, r"strides=\[0, 2, 2, 2\] of 4 stages .*, at least 1"),
        ({"num_encoder_blocks": 0}, r"config.json: num_encoder_blocks is 0; wanted at least 1"),
        ({"num_attention_heads": [1, 2, 3, 400]}, "says 400 heads in a stage of 16 channels; wanted"),
        ({"decoder_hidden_size": 0}, "says decoder_hidden_size=0; wanted at least 1"),
        ({"image_size": "large"}, r"image_size='large'; wanted a number of pixels, or height and width"),
    ],
)
def test_numbers_that_make_no_stages_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "segformer", **SIZES, **fields}))
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "config.json")
