"""MobileViT under a pyramid: it computes what a network written down beside it, with one convolution of maps side by
side, does; the published oddities are there; its folder is opened with compresso, and by the file beside the weights.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSemanticSegmentation, MobileViTConfig, MobileViTModel

from compresso.arch.base import arch_for
from compresso.checkpoint.code import refuse_code, trusted
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.data.pictures import png
from compresso.edit.shrink import shrink_
from compresso.errors import CheckpointError
from compresso.formats.hf import reopen_and_compare, save_checkpoint
from compresso.native import PYRAMID_CLASSES, PYRAMID_FILE
from compresso.tasks.segmentation import SEGMENTATION
from tests.conftest import Call
from tests.tasks.scenes import scene

CONFIG, BACKBONE, SEGMENTER = PYRAMID_CLASSES["mobilevit"]
SIZES: dict[str, Any] = {
    "image_size": [36, 48],
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
    "num_labels": 5,
}


def made(**fields: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SEGMENTER(CONFIG(**SIZES, **fields)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values, low, high in ((module.weight, 0.7, 1.3), (module.bias, -0.5, 0.5)):
                    values.uniform_(low, high, generator=draw)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(0, 1.3 / module.weight[0].numel() ** 0.5, generator=draw)
    return model


def written_down(model: Any, pixels: Tensor) -> Tensor:
    """The head as section 8 of the published code has it: maps side by side, convolutions of all of them."""
    head = model.pyramid_head
    states = model.mobilevit(pixels, output_hidden_states=True).hidden_states
    levels = list(states[1:])
    wide = lambda maps, to: functional.interpolate(maps, to.shape[2:], mode="bilinear", align_corners=True)  # noqa: E731

    def together(block: Any, maps: list[Tensor]) -> Tensor:
        weight = torch.cat([part.weight for part in block.parts], 1)
        return block.normalization(functional.conv2d(torch.cat(maps, 1), weight, padding=1)).relu()

    pools = []
    for bins, pool in zip((1, 2, 4, 6), head.pools, strict=True):
        small = functional.conv2d(functional.adaptive_avg_pool2d(levels[3], bins), pool.convolution.weight)
        pools.append(wide(pool.normalization(small).relu(), levels[3]))
    levels[3] = together(head.bottleneck, [levels[3], *pools])
    for i in (1, 2, 3):
        levels[i] = head.laterals[i - 1](levels[i])
    sums = [head.smooth(levels[i] + wide(levels[i + 1], levels[i])) for i in (0, 1, 2)]
    fused = together(head.fusion, [sums[0], wide(sums[1], sums[0]), wide(sums[2], sums[0]), wide(levels[3], sums[0])])
    return head.classifier(fused)


@torch.no_grad()
def test_it_is_the_network_that_was_published() -> None:
    model, pixels = made(), torch.randn(2, 3, 36, 48, generator=torch.Generator().manual_seed(2))
    found = model(pixels).logits
    assert found.shape == (2, 5, 9, 12) and float(found.std()) > 0.05
    torch.testing.assert_close(found, written_down(model, pixels), rtol=1e-4, atol=1e-5)


def test_published_oddities_are_counted() -> None:
    """64 x 64 x 3 x 3 once for three sums; laterals of levels 2 to 4 alone; no conv_1x1_exp; two heads."""
    with torch.device("meta"):
        model = SEGMENTER(CONFIG(num_labels=14))
    count = lambda module: sum(one.numel() for one in module.parameters())  # noqa: E731
    head = model.pyramid_head
    assert count(head.smooth) == 64 * 64 * 9 + 64
    assert [count(one) for one in head.laterals] == [96 * 64 + 64, 128 * 64 + 64, 160 * 64 + 64]
    assert count(head.fusion) == 4 * 64 * 64 * 9 + 2 * 64
    assert count(head.bottleneck) == (160 + 4 * 40) * 160 * 9 + 2 * 160
    assert not any("conv_1x1_exp" in name for name, _ in model.named_parameters())
    attention = next(one for name, one in model.named_modules() if name.endswith("attention.attention"))
    assert attention.num_attention_heads == 2


def test_gains_start_at_one() -> None:
    with torch.random.fork_rng(devices=[]):
        model = SEGMENTER(CONFIG(**SIZES))
    gains = [one.weight for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    assert len(gains) > 30 and all(bool((gain == 1).all()) for gain in gains)


def test_widths_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pool_channels \[4, 4\]: wanted seven widths, and as many pools as scales"):
        SEGMENTER(CONFIG(**SIZES, pool_channels=[4, 4]))


@pytest.fixture
def narrow(tmp_path: Path) -> tuple[Any, Path]:
    """Every axis of the head cut to a width of its own, written."""
    model = made()
    arch = arch_for(model.config)
    axes = [axis for axis in arch.axes(model) if axis.name.startswith("head.")]
    assert {axis.name for axis in axes} >= {"head.pools.3", "head.pooled", "head.smooth", "head.fused"}
    keep = {axis.name: axis.size // 2 + i % 2 for i, axis in enumerate(axes)}
    shrink_(model, axes, Plan({name: tuple(range(n)) for name, n in keep.items()}))
    save_checkpoint(model, [], tmp_path / "small")
    return model, tmp_path / "small"


def test_a_result_of_any_widths_is_a_folder_that_opens(narrow: tuple[Any, Path]) -> None:
    model, folder = narrow
    again = load_model(open_source(folder))
    assert type(again) is SEGMENTER and again.config.pool_channels == model.config.pool_channels
    pixels = torch.randn(1, 3, 36, 48)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    refuse_code(folder)
    assert trusted(folder)
    (folder / PYRAMID_FILE.name).write_text("raise SystemExit\n")
    refuse_code(folder)  # it is not read
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes"):
        trusted(folder)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "agreeing"), [("f32", 1.0), ("f16", 0.99), ("int8", 0.9)])
def test_engines_run_its_graph(
    dtype: str, agreeing: float, narrow: tuple[Any, Path], tmp_path: Path, call: Call
) -> None:
    """Calibrated on 6 scenes, compared on 6; int8 of a network of random numbers keeps less than a trained one's."""
    folder = narrow[1]
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    pairs = [scene(seed, 48)[:2] for seed in range(12)]
    cells = [{"image": {"bytes": png(p), "path": "a"}, "label": {"bytes": png(c), "path": "b"}} for p, c in pairs]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), tmp_path / "rows.parquet")
    how = ("--format", "onnx", "--dtype", dtype, "--data", tmp_path / "rows.parquet", "--output", tmp_path / "graph")
    code, out, error = call("export", folder, *how, "--json")
    assert code == 0, error
    facts = json.loads(out)
    assert facts["compared_on"] == 6 and facts["calibrated_on"] == (6 if dtype == "int8" else 0)
    for program, package in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        if find_spec(package) is not None:
            one = facts["engines"][program]
            assert (one["opens"], one["reason"]) == ("yes", "")
            assert one["agreement"] >= agreeing and "not_run" not in one


def test_a_fresh_process_opens_it(narrow: tuple[Any, Path]) -> None:
    model, folder = narrow
    assert reopen_and_compare(folder, model, torch.randn(1, 3, 36, 48), atol=1e-5) < 1e-5


@pytest.mark.slow
def test_transformers_alone_opens_it_by_the_file_beside_it(narrow: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = narrow
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        f"model = Auto.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        "assert 'compresso' not in sys.modules\n"
        "print(float(model(torch.ones(1, 3, 36, 48)).logits.double().sum()))\n"
    )
    with torch.no_grad():
        wanted = float(model(torch.ones(1, 3, 36, 48)).logits.double().sum())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)


def test_pretrained_features_are_kept_under_a_new_head(tmp_path: Path) -> None:
    """The folder of a stock backbone, whose config is given our model type."""
    stock = MobileViTModel(MobileViTConfig(**{**SIZES, "num_attention_heads": 2}))
    stock.save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "stock" / "config.json").write_text(json.dumps({**config, "model_type": CONFIG.model_type}))
    base = load_model(open_source(tmp_path / "stock"))
    assert type(base) is BACKBONE and SEGMENTATION.lacks_head(base.config)
    model = SEGMENTATION.with_head(base, ("a", "b", "c"), 0)
    assert type(model) is SEGMENTER and model.config.num_labels == 3
    kept = model.state_dict()
    for name, tensor in stock.state_dict().items():
        if not name.startswith("conv_1x1_exp"):
            assert torch.equal(kept[f"mobilevit.{name}"], tensor)
    assert type(AutoModel.from_config(base.config)) is BACKBONE
    assert type(AutoModelForSemanticSegmentation.from_config(base.config)) is SEGMENTER
