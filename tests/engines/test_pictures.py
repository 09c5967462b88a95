"""A graph of a model of pictures in fewer bits: float16 stays within rounding and names the same classes, int8 follows
its calibration pictures; a process with too little memory says so; what is asked for wrongly is refused in a line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.conftest import Call
from tests.tasks.scenes import CLASSES, NARROW, SIDE, scene
from torch import nn
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

from compresso.data.pictures import png
from compresso.engines.encoder import encoder_logits, encoder_parity, encoder_reference
from compresso.engines.onnx_runtime import ONNX, OnnxEngine
from compresso.engines.pictures import RUNTIMES, agreement, ran
from compresso.formats.onnx_encoder import save_onnx_encoder
from compresso.formats.onnx_pictures import calibrated

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime: not installed")
SIZES: dict[str, Any] = {
    **NARROW,
    "num_labels": len(CLASSES),
}


SEED = 3


def made() -> MobileViTForSemanticSegmentation:
    """Random weights, and statistics of pictures in the batch norms: what is computed stays near 1."""
    draw = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):  # biases and the like are drawn from the global generator
        torch.manual_seed(SEED)
        model = MobileViTForSemanticSegmentation(MobileViTConfig(**SIZES)).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, 1.3 / module.weight[0].numel() ** 0.5, generator=draw)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        model(pixel_values=seen(16, first=200))
    return model.eval()


def seen(n: int, first: int = 0) -> torch.Tensor:
    return torch.stack([scene(seed, SIDE)[0] for seed in range(first, first + n)]).float() / 255


def test_agreement_is_the_share_of_places_with_the_same_likeliest_class() -> None:
    wanted = torch.zeros(1, 3, 2, 2)
    wanted[0, 1] = 1
    found = wanted.clone()
    found[0, 2, 0, 1] = 2
    assert agreement(found, wanted) == 0.75
    assert agreement(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]])) == 0.5


@pytest.mark.slow
def test_half_precision_and_calibrated_bits_keep_the_classes(tmp_path: Path) -> None:
    model, held = made(), seen(8, first=100)
    wanted = encoder_reference(model, None, pictures=held).logits
    found: dict[str, torch.Tensor] = {}
    for name, pictures in (("f16", None), ("int8", seen(12)), ("dark", seen(2) * 1e-3)):
        dtype = "int8" if name == "dark" else name
        save_onnx_encoder(model, tmp_path / name, dtype=dtype, pictures=seen(2) * 1e-3 if name == "dark" else pictures)
        assert [path.name for path in (tmp_path / name).glob("*.onnx*")] == ["model.onnx"]
        found[name] = encoder_logits(ONNX, tmp_path / name, {"pixel_values": held})
    apart = {name: float((one - wanted).abs().max()) for name, one in found.items()}
    # what is near 1 inside is rounded by up to 5e-4 in each of some twenty layers, whose errors partly cancel
    assert 0 < apart["f16"] < 5e-3 and agreement(found["f16"], wanted) > 0.99
    assert apart["f16"] < apart["int8"] < apart["dark"]  # scales of pictures that are none cut values off
    assert agreement(found["int8"], wanted) > agreement(found["dark"], wanted)


def test_a_scale_covers_all_but_single_values_and_the_ends_stay_whole(tmp_path: Path) -> None:
    """Three convolutions, the first by 1; and one value of 100 among 16,384 up to 1."""
    onnx = pytest.importorskip("onnx")
    nodes, weights, name = [], [], "pixel_values"
    for i in range(3):
        weights.append(onnx.numpy_helper.from_array(np.full((1, 1, 1, 1), i + 1.0, "float32"), f"weight{i}"))
        nodes.append(onnx.helper.make_node("Conv", [name, f"weight{i}"], [name := f"maps{i}"], name=f"conv{i}"))
    kinds = onnx.TensorProto.FLOAT
    sides = [onnx.helper.make_tensor_value_info(one, kinds, ["n", 1, 64, 64]) for one in ("pixel_values", name)]
    graph = onnx.helper.make_graph(nodes, "three", sides[:1], sides[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "whole.onnx")
    pictures = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures[2, 0, 5, 7] = 100
    calibrated(tmp_path / "whole.onnx", tmp_path / "model.onnx", pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "whole.onnx"]
    found = onnx.load(tmp_path / "model.onnx").graph
    made = {node.output[0]: node for node in found.node}
    convolutions = [one for one in found.node if one.op_type == "Conv"]
    assert [one.input[1] in made for one in convolutions] == [False, True, False]  # rounded weights
    numbers = {one.name: onnx.numpy_helper.to_array(one) for one in found.initializer}
    (read,) = [one for one in found.node if one.op_type == "QuantizeLinear" and one.input[0] == "maps0"]
    assert 0.95 / 255 < float(numbers[read.input[1]]) < 1.2 / 255


def flat(path: Path, weights: list[float], bias: float) -> None:
    """Convolutions of one channel and one place, each by a weight, the second with a bias."""
    onnx = pytest.importorskip("onnx")
    nodes, constants, name = [], [], "pixel_values"
    for i, weight in enumerate(weights):
        output = "logits" if i == len(weights) - 1 else f"conv{i}"
        constants.append(onnx.numpy_helper.from_array(np.full((1, 1, 1, 1), weight, dtype=np.float32), f"w{i}"))
        constants.append(onnx.numpy_helper.from_array(np.full(1, bias if i == 1 else 0, dtype=np.float32), f"b{i}"))
        nodes.append(onnx.helper.make_node("Conv", [name, f"w{i}", f"b{i}"], [output], name=f"n{i}"))
        name = output
    shape = ["n", 1, 8, 8]
    given, found = (onnx.helper.make_tensor_value_info(one, 1, shape) for one in ("pixel_values", "logits"))
    graph = onnx.helper.make_graph(nodes, "flat", [given], [found], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("weights", "bias", "shown"),
    [
        ([1.0, 1e-5, 1.0, 1.0], 1.0, [1.0, 1.0]),
        ([1.0, 0.0, 1.0, 1.0], 1.0, [1.0, 1.0]),
        ([1.0, 0.0, 1.0, 1.0], 0.0, [1.0, 1.0]),
        ([1.0, 1.0, 1.0, 1.0], 0.0, [1e-12, 1.0]),
        ([1.0, 1.0, 1.0, 1.0], 0.0, [0.0, 1.0]),
    ],
    ids=["nearly constant", "constant", "nothing", "a dark picture first", "a black picture first"],
)
def test_flat_activations_are_calibrated(weights: list[float], bias: float, shown: list[float], tmp_path: Path) -> None:
    """A network says in 8 bits what it says in 32, up to a hundredth of what it says at most."""
    flat(tmp_path / "whole.onnx", weights, bias)
    draw = torch.Generator().manual_seed(0)
    pictures = torch.stack([torch.rand(1, 8, 8, generator=draw) * size for size in shown])
    calibrated(tmp_path / "whole.onnx", tmp_path / "graph.onnx", pictures)
    found = [
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": pictures.numpy()}
        )[0]
        for name in ("whole.onnx", "graph.onnx")
    ]
    assert float(np.abs(found[0] - found[1]).max()) <= 0.011 * max(float(np.abs(found[0]).max()), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", RUNTIMES, ids=lambda one: one.program)
def test_each_engine_reads_a_graph_in_half_precision(engine: OnnxEngine, tmp_path: Path) -> None:
    if (missing := engine.missing()) is not None:
        pytest.skip(missing)
    model, shown = made(), seen(3, first=100)
    save_onnx_encoder(model, tmp_path / "f16", dtype="f16")
    reference = encoder_reference(model, None, "f16", shown)
    assert encoder_parity(engine, tmp_path / "f16", reference).opens == "yes"
    found = encoder_logits(engine, tmp_path / "f16", reference.given)
    assert found.shape == reference.logits.shape and agreement(found, reference.logits) > 0.99
    assert 0 < float((found - reference.logits).abs().max()) < 5e-3


@pytest.mark.slow
def test_a_graph_runs_in_a_process_with_a_limit_of_memory(tmp_path: Path) -> None:
    save_onnx_encoder(made(), tmp_path / "graph")
    taken = ran(ONNX, tmp_path / "graph", seen(2))
    assert not isinstance(taken, str)
    assert taken.low <= taken.frames <= taken.high and taken.processor_ms > 0
    assert 1e7 < taken.peak < taken.limit == 4_000_000_000
    refused = ran(ONNX, tmp_path / "graph", seen(2), limit=20_000_000)
    assert isinstance(refused, str) and "under a limit of 0.02 GB" in refused


@pytest.mark.slow
def test_the_command_calibrates_compares_and_tells(
    tmp_path: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    made().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    pairs = [scene(seed, SIDE)[:2] for seed in range(20)]
    cells = [{"image": {"bytes": png(p), "path": "a"}, "label": {"bytes": png(c), "path": "b"}} for p, c in pairs]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), tmp_path / "rows.parquet")
    how = ["--format", "onnx", "--dtype", "int8", "--data", tmp_path / "rows.parquet", "--output", tmp_path / "out"]
    code, out, error = call("export", tmp_path / "model", *how, "--json")
    assert code == 0, error
    facts = json.loads(out)
    assert (facts["calibrated_on"], facts["compared_on"], facts["dtype"]) == (10, 10, "int8")
    one = facts["engines"]["ONNX Runtime"]
    assert one["opens"] == "yes" and 0.5 < one["agreement"] <= 1 and 0 < one["peak_bytes"] < one["limit_bytes"]
    assert (one["agreement"] < 0.99) == ("in ONNX Runtime the likeliest class is the model's at" in caplog.text)
    code, out, error = call(
        "export", tmp_path / "model", "--format", "onnx", "--dtype", "q4", "--output", tmp_path / "x"
    )
    assert code != 0 and "--dtype q4: a graph of this model is written in f32, int8, f16" in error


def test_data_is_for_graphs_of_pictures(tmp_path: Path, call: Call) -> None:
    from compresso.data import nano

    code, _, error = call("export", nano.path(), "--format", "onnx", "--data", "x", "--output", tmp_path / "x")
    assert code != 0 and "--data is pictures for --format onnx of a model of pictures; leave it out" in error
