"""SegFormer with layers of unequal widths: a folder of our class computes what the live model does, whatever left it;
it opens with compresso, in a fresh process and by the file beside the weights, and can be shrunk again.
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
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.outputs import any_input, outputs
from compresso.checkpoint.code import refuse_code, trusted
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.data.pictures import png
from compresso.edit.shrink import shrink_
from compresso.errors import CheckpointError, ExportError
from compresso.formats.hf import reopen_and_compare, save_checkpoint
from compresso.native import SEGFORMER_CLASSES, SEGFORMER_FILE
from compresso.tasks.segmentation import SEGMENTATION
from tests.arch.test_segformer import CLASSES, made
from tests.conftest import Call
from tests.tasks.scenes import scene

CONFIG, BACKBONE, SEGMENTER, CLASSIFIER = SEGFORMER_CLASSES["segformer"]
OWN = {"bare": BACKBONE, "segmenter": SEGMENTER, "classifier": CLASSIFIER}


def kept(axes: tuple[Axis, ...], seed: int = 0) -> Plan:
    """Of each axis a number of its own; one attention of a stage leaves, and one FFN of another."""
    draw = torch.Generator().manual_seed(seed)
    keep: dict[str, tuple[int, ...]] = {}
    for i, axis in enumerate(axes):
        if axis.kind in (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN):
            n = max(axis.size * (3 + i % 3) // 6, 1)
            keep[axis.name] = tuple(sorted(torch.randperm(axis.size, generator=draw)[:n].tolist()))
    keep |= {"stages.1.attention": (0, 2), "stages.2.mlp": (1,)}
    return Plan(keep)


def narrow(name: str, folder: Path) -> PreTrainedModel:
    """A stock model of unequal layers, written."""
    model = made(name)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    shrink_(model, axes, kept(axes))
    assert save_checkpoint(model, arch.shapes(model), folder) == "native"
    return model


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_result_of_any_widths_is_a_folder_that_opens(name: str, tmp_path: Path) -> None:
    model = narrow(name, tmp_path / "small")
    again, given = load_model(open_source(tmp_path / "small")), any_input(model.config)
    assert type(again) is OWN[name]
    torch.testing.assert_close(outputs(again, given), outputs(model, given))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    config: Any = again.config
    assert config.heads_by_layer[1][1] == 0 == config.channels_by_layer[2][0]
    assert config.head_dims == [8, 6, 4, 4] and config.heads_by_layer[0] == [1, 1]
    assert [axis.name for axis in arch_for(config).axes(again)] == [a.name for a in arch_for(config).axes(model)]


def test_a_reopened_one_is_shrunk_again(tmp_path: Path) -> None:
    narrow("segmenter", tmp_path / "small")
    model = load_model(open_source(tmp_path / "small"))
    arch, given = arch_for(model.config), any_input(model.config)
    axes = arch.axes(model)
    halves = {a.name: tuple(range(max(a.size // 2, 1))) for a in axes if a.kind in (Kind.CHANNEL, Kind.HIDDEN)}
    shrink_(model, axes, Plan({**halves, "stages.3.layers": (1,)}))
    with pytest.raises(ExportError, match=r"its layers differ already\. Use layout native"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "none", layout="uniform")
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "smaller") == "native"
    again = load_model(open_source(tmp_path / "smaller"))
    torch.testing.assert_close(outputs(again, given), outputs(model, given))
    assert reopen_and_compare(tmp_path / "smaller", model, given, atol=1e-5) < 1e-5


def test_a_whole_model_is_written_so_where_it_is_asked_for(tmp_path: Path) -> None:
    model = made("segmenter")
    assert save_checkpoint(model, (), tmp_path / "whole", layout="native") == "native"
    given = any_input(model.config)
    torch.testing.assert_close(outputs(load_model(open_source(tmp_path / "whole")), given), outputs(model, given))


def test_a_config_of_ours_without_its_fields_is_a_stock_one() -> None:
    model = made("segmenter")
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    own = SEGMENTER(CONFIG(**fields)).eval()
    own.load_state_dict(model.state_dict())
    given = any_input(model.config)
    torch.testing.assert_close(outputs(own, given), outputs(model, given))


def test_fewer_stages_than_a_config_lists_are_written(tmp_path: Path) -> None:
    """Of three stages, whose patches and strides are left as they are for four by default."""
    fewer: dict[str, Any] = {"hidden_sizes": [8, 12, 20], "num_attention_heads": [1, 2, 5], "mlp_ratios": [4, 2, 3]}
    model = made("segmenter", num_encoder_blocks=3, depths=[2, 3, 2], **fewer)
    arch, given = arch_for(model.config), any_input(model.config)
    shrink_(model, arch.axes(model), kept(arch.axes(model)))
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "small") == "native"
    torch.testing.assert_close(outputs(load_model(open_source(tmp_path / "small")), given), outputs(model, given))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heads_by_layer": [[1]] * 4}, r"heads_by_layer=.*: wanted a number for each of \[2, 2, 2, 2\] layers"),
        ({"channels_by_layer": [[1, -1]] * 4}, r"channels_by_layer=.*at least 0"),
        ({"head_dims": [8, 8]}, r"head_dims=\[8, 8\]: wanted one for each of 4 stages, at least 1"),
        ({"hidden_sizes": [8, 8]}, "num_encoder_blocks=4: wanted as many of all that stages have"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        CONFIG(**fields)
    written = {"model_type": CONFIG.model_type, "image_size": 32, **fields}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="is not a valid compresso_segformer config"):
        open_source(tmp_path / "config.json")


def test_another_file_beside_it_is_not_run(tmp_path: Path) -> None:
    narrow("segmenter", tmp_path / "small")
    refuse_code(tmp_path / "small")
    assert trusted(tmp_path / "small")
    (tmp_path / "small" / SEGFORMER_FILE.name).write_text("raise SystemExit\n")
    refuse_code(tmp_path / "small")  # it is not read
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes"):
        trusted(tmp_path / "small")


@pytest.mark.slow
def test_transformers_alone_opens_it_by_the_file_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    model = narrow("segmenter", folder)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        f"model = Auto.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        "assert 'compresso' not in sys.modules\n"
        "print(float(model(torch.ones(1, 3, 36, 44)).logits.double().sum()))\n"
    )
    with torch.no_grad():
        wanted = float(model(torch.ones(1, 3, 36, 44)).logits.double().sum())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "agreeing"), [("f32", 1.0), ("f16", 0.99), ("int8", 0.8)])
def test_engines_run_its_graph(dtype: str, agreeing: float, tmp_path: Path, call: Call) -> None:
    """Calibrated on 6 scenes, compared on 6; int8 of a network of random numbers keeps less than a trained one's."""
    folder = tmp_path / "small"
    narrow("segmenter", folder)
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


def test_a_backbone_of_unequal_layers_is_kept_under_a_new_head(tmp_path: Path) -> None:
    bare = narrow("bare", tmp_path / "bare")
    base = load_model(open_source(tmp_path / "bare"))
    assert type(base) is BACKBONE and SEGMENTATION.lacks_head(base.config)
    model = SEGMENTATION.with_head(base, ("a", "b", "c"), 0)
    assert type(model) is SEGMENTER and model.config.num_labels == 3
    for name, tensor in bare.state_dict().items():
        assert torch.equal(model.state_dict()[f"segformer.{name}"], tensor)
    assert outputs(model, any_input(model.config)).shape[1] == 3
    assert type(AutoModel.from_config(base.config)) is BACKBONE
    assert type(AutoModelForSemanticSegmentation.from_config(base.config)) is SEGMENTER
