"""MobileViT under the laws: masked is smaller, counted is predicted, multiply-accumulates are what hooks see; residual
sums share an index set; a mask before a batch norm alone is no removal; a config that holds the result opens it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTForSemanticSegmentation,
    MobileViTModel,
    PreTrainedModel,
)

from compresso.arch.base import arch_for
from compresso.arch.mobilevit import MobileViT
from compresso.arch.outputs import any_input, outputs
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.commands.inspect import inspect, show
from compresso.core.axis import Axis, Kind
from compresso.core.cost import CostModel
from compresso.core.loss import LABEL
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import BudgetError, ExportError
from compresso.formats.hf import save_checkpoint
from compresso.native import PYRAMID_CLASSES
from compresso.observe.gate_taylor import gate_taylor
from compresso.runner.run import run

_PYRAMID_CONFIG, _, PYRAMID = PYRAMID_CLASSES["mobilevit"]
SIZES = {
    "image_size": 36,  # feature maps of odd sides, which patches of 2 do not divide
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
    "num_attention_heads": 2,
    "num_labels": 5,
    "aspp_out_channels": 8,
}
CLASSES: dict[str, type[PreTrainedModel]] = {
    "classifier": MobileViTForImageClassification,
    "segmenter": MobileViTForSemanticSegmentation,
    "bare": MobileViTModel,
    "pyramid": PYRAMID,
}


def made(name: str) -> PreTrainedModel:
    """Random weights and statistics of batch norms, so that a bias of a dead channel shows."""
    draw = torch.Generator().manual_seed(7)
    config = _PYRAMID_CONFIG if name == "pyramid" else MobileViTConfig
    model = CLASSES[name](config(**SIZES)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values, low, high in (
                    (module.weight, 0.7, 1.3),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 1.5),
                ):
                    assert isinstance(values, Tensor)
                    values.uniform_(low, high, generator=draw)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, 1.3 / module.weight[0].numel() ** 0.5, generator=draw)
    return model


@pytest.fixture(params=sorted(CLASSES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return made(request.param)


def drawn(axes: tuple[Axis, ...], seed: int = 0, soft: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    for axis in axes:
        values = torch.empty(axis.size).uniform_(0.3 if soft else 1.0, 1.0, generator=draw)
        values[torch.randperm(axis.size, generator=draw)[: max(axis.size // 3, 1)]] = 0
        masks[axis.name] = values
    return masks


def kinds_of(name: str) -> Callable[[Axis], bool]:
    return {
        "wide": lambda axis: axis.name.endswith("wide"),
        "ffn": lambda axis: axis.name.endswith("channels"),
        "features": lambda axis: axis.kind == Kind.HIDDEN,
        "all": lambda axis: True,
    }[name]


@pytest.mark.parametrize("kind", ["wide", "ffn", "features", "all"])
@pytest.mark.parametrize("soft", [False, True])
def test_masked_is_smaller_and_counted_is_predicted(model: PreTrainedModel, kind: str, soft: bool) -> None:
    arch, given = arch_for(model.config), any_input(model.config)
    axes = tuple(filter(kinds_of(kind), arch.axes(model)))
    assert isinstance(arch, MobileViT) and axes
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


def hooked(model: PreTrainedModel) -> int:
    """Multiply-accumulates of one picture, by what every convolution and linear is seen to read and write."""
    total = 0

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            total += output.numel() * kernel * inputs[0].shape[1] // module.groups
        else:
            total += output.numel() * inputs[0].shape[-1]

    hooks = [one.register_forward_hook(see) for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    outputs(model, any_input(model.config))
    for hook in hooks:
        hook.remove()
    return total


def test_multiply_accumulates_are_those_that_hooks_see(model: PreTrainedModel) -> None:
    arch = arch_for(model.config)
    assert int(CostModel(arch.axes(model), arch.weights(model))().macs) == hooked(model)


def test_the_published_model_has_its_size() -> None:
    """apple/mobilevit-small: 5.6 M parameters and 2.0 G multiply-adds (arXiv 2110.02178, table 3 and section 4)."""
    with torch.device("meta"):
        small = MobileViTForImageClassification(MobileViTConfig(num_labels=1000))
    arch = arch_for(small.config)
    counted = CostModel(arch.axes(small), arch.weights(small))()
    assert int(counted.total) == 5_578_632
    assert 1.4e9 < float(counted.macs) < 2.1e9


def test_residual_sums_share_an_index_set() -> None:
    model = made("classifier")
    axes = {axis.name: axis for axis in arch_for(model.config).axes(model)}
    writers = {
        piece.param.rpartition(".convolution")[0] for piece in axes["stages.1.features"].slices if piece.dim == 0
    }
    assert {f"mobilevit.encoder.layer.1.layer.{j}.reduce_1x1" for j in range(3)} <= writers
    # the first stage adds to the stem, whose width is its own
    assert "stages.0.features" not in axes
    stem = {piece.param for piece in axes["stem.features"].slices}
    assert "mobilevit.conv_stem.convolution.weight" in stem
    assert "mobilevit.encoder.layer.0.layer.0.reduce_1x1.normalization.bias" in stem


def test_masks_of_examples_are_masks_one_by_one() -> None:
    model = made("classifier")
    axes = arch_for(model.config).axes(model)
    given = torch.cat([any_input(model.config), any_input(model.config).flip(-1)])
    one, two = drawn(axes, 1), drawn(axes, 2)
    with torch.no_grad(), gated(model, axes, {name: torch.stack([one[name], two[name]]) for name in one}):
        both = model(pixel_values=given).logits
    for i, masks in enumerate((one, two)):
        with torch.no_grad(), gated(model, axes, masks):
            torch.testing.assert_close(model(pixel_values=given[i : i + 1]).logits[0], both[i], rtol=1e-4, atol=1e-4)


def test_a_mask_before_a_batch_norm_is_no_removal_until_its_bias_is_folded() -> None:
    """The code of arXiv 2309.02617 puts the mask on a convolution's weight: what the batch norm then makes of a dead
    channel goes on. Behind a 1 x 1 convolution it is a constant, and folded into the next batch norm's mean the chain
    is the smaller one.
    """
    torch.manual_seed(3)
    first, norm, act = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU()
    second, after = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
    for one in (norm, after):
        for values in (one.weight, one.bias, one.running_mean, one.running_var):
            assert isinstance(values, Tensor)
            nn.init.uniform_(values, 0.5, 1.5)
    chain = nn.Sequential(first, norm, act, second, after).eval()
    given = torch.randn(2, 4, 7, 7)
    dead, kept = [1, 4], [0, 2, 3, 5]
    with torch.no_grad():
        first.weight[dead] = 0
        masked = chain(given)
        assert norm.running_mean is not None and norm.running_var is not None and after.running_mean is not None
        constant = act(norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())

        def smaller() -> Tensor:
            hidden = act(norm(first(given)))[:, kept]
            return after(nn.functional.conv2d(hidden, second.weight[:, kept]))

        assert float((smaller() - masked).abs().max()) > 1e-2
        after.running_mean -= second.weight[:, dead, 0, 0] @ constant[dead]
        torch.testing.assert_close(smaller(), masked, rtol=1e-5, atol=1e-5)


def test_scores_predict_what_dimming_a_channel_does() -> None:
    model = made("classifier").double()
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.name.endswith(("wide", "features"))][:8]
    batch = {"pixel_values": any_input(model.config).double(), "labels": torch.tensor([2])}

    def loss(one: Callable[..., object], given: dict[str, Tensor]) -> Tensor:
        logits = model(pixel_values=given["pixel_values"]).logits
        return nn.functional.cross_entropy(logits, given["labels"])

    scores = gate_taylor(model, axes, [batch], loss=LABEL)
    for axis in axes:
        unit, losses = int(scores[axis.name].argmax()), []
        for value in (0.999, 1.001):
            mask = torch.ones(axis.size, dtype=torch.float64)
            mask[unit] = value
            with torch.no_grad(), gated(model, axes, {axis.name: mask}):
                losses.append(float(loss(model, batch)))
        assert float(scores[axis.name][unit]) == pytest.approx(((losses[1] - losses[0]) / 0.002) ** 2, rel=5e-2)


def test_a_result_that_the_config_holds_is_written_and_opened(tmp_path: Path) -> None:
    model = made("segmenter")
    arch, given = arch_for(model.config), any_input(model.config)
    axes = arch.axes(model)
    keep = {a.name: a.size // 2 for a in axes if a.name.endswith("channels")}
    keep |= {a.name: 16 for a in axes if a.kind == Kind.HIDDEN and a.size == 24}
    shrink_(model, axes, Plan({name: tuple(range(n)) for name, n in keep.items()}))
    assert model.config.mlp_ratio == pytest.approx(1.0, abs=0.1) and model.config.neck_hidden_sizes[-2] == 16
    save_checkpoint(model, arch.shapes(model), tmp_path / "small")
    again = load_model(open_source(tmp_path / "small"))
    torch.testing.assert_close(outputs(again, given), outputs(model, given))


def test_a_result_that_no_config_holds_is_refused(tmp_path: Path) -> None:
    model = made("classifier")
    arch = arch_for(model.config)
    axis = next(axis for axis in arch.axes(model) if axis.name == "stages.0.0.wide")
    shrink_(model, arch.axes(model), Plan({axis.name: (0, 1, 2)}))
    with pytest.raises(ExportError, match="layout uniform cannot hold this mobilevit"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "odd")


def test_multiply_accumulates_are_called_those_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("segmenter").save_pretrained(tmp_path)
    facts = inspect(tmp_path)
    assert facts["macs_of"] == "picture"
    show(facts, False)
    said = capsys.readouterr().out
    assert f"{facts['macs_per_token']:,} multiply-accumulates a picture" in said and "token" not in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"milliseconds": 250.0}, "of a model of pictures is measured and needs latency_table="),
        ({"speedup": "2x"}, "speedup='2x': give milliseconds="),
    ],
)
def test_a_budget_of_time_without_a_table_is_refused_in_a_line(
    tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    made("segmenter").save_pretrained(tmp_path / "model")
    with pytest.raises(BudgetError, match=said):
        run("segmenter", tmp_path / "model", tmp_path / "none.parquet", output=tmp_path / "out", quiet=True, **asked)
