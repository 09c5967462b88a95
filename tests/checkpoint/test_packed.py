"""Weights stored in few bits: opened by those who run a model, refused by those who change it, checked as others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model, meta_model, numbers_of
from compresso.checkpoint.source import open_source
from compresso.commands.evaluate import evaluate
from compresso.commands.measure import measure
from compresso.core.rounding import fit
from compresso.engines.parity import ids_of, reference_of
from compresso.engines.transformers import PLAIN
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint
from compresso.formats.packed import save_packed
from compresso.formats.packing import Packing
from compresso.loading import load
from compresso.runner.inspection import inspect
from tests.conftest import Call
from tests.formats.nano_variants import nano_tokenizer, pruned_nano

pytest.importorskip("compressed_tensors", reason="compressed-tensors: not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of compressed-tensors
HOW = {
    "symmetric": (4, 32, True, None),
    "asymmetric": (4, 32, False, None),
    "rows of 8 bits": (8, 0, True, None),
    "w8a8": (8, 0, True, "token"),
}


def rounded(how: str) -> tuple[PreTrainedModel, Packing]:
    """The embedded model with its linears on a grid."""
    model = pruned_nano()
    bits, group, symmetric, inputs = HOW[how]
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and "layers" in name]
    for name in names:
        weight = model.get_submodule(name).weight.data
        weight.copy_(fit(weight, bits, group=group, symmetric=symmetric).round(weight))
    return model, Packing(tuple(names), bits, group, symmetric, inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, packing = rounded("symmetric")
    folder = tmp_path_factory.mktemp("packed") / "packed"
    save_packed(model, packing, folder, tokenizer=nano_tokenizer())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_packed_model_is_read_as_the_dense_one_it_was_packed_from(how: str, tmp_path: Path) -> None:
    model, packing = rounded(how)
    save_packed(model, packing, tmp_path / "packed")
    source = open_source(tmp_path / "packed", packed=True)
    read = load_model(source, torch.float32)
    assert {name: one.shape for name, one in read.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }
    for name, weight in read.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), atol=1e-5, rtol=1e-5)
    assert numbers_of(source) == sum(one.numel() for one in model.parameters())
    assert [one.shape for one in meta_model(source).parameters()] == [one.shape for one in model.parameters()]
    read.float().to("cpu")  # it says no more that it is packed
    assert not hasattr(read.config, "quantization_config")


def test_who_would_change_it_is_told_to_give_the_dense_one(folder: Path, call: Call, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantised, which cannot be pruned"):
        open_source(folder)
    for words in (("run", "magnitude-structured", "--output", tmp_path / "out"), ("plan", "magnitude-structured")):
        code, _, err = call(*words, "--model", folder)
        assert code == 2 and "cannot be pruned" in err


def test_it_is_measured_evaluated_inspected_and_loaded(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small dog who liked to run in the garden all day long.\n\n" * 40)
    dense = rounded("symmetric")[0]
    save_checkpoint(dense, arch_for(dense.config).shapes(dense), tmp_path / "dense", tokenizer=nano_tokenizer())
    of_dense, of_packed = (
        evaluate(one, corpus=str(text), device="cpu").models[0].measurements[0] for one in (tmp_path / "dense", folder)
    )
    assert of_packed.value == pytest.approx(of_dense.value, rel=1e-3)
    assert "were unpacked, so it runs, and takes memory, as a dense model" in caplog.text
    short = {"batches": [1], "rounds": 1, "prompt_tokens": 8, "new_tokens": 2, "memory": False, "quiet": True}
    report = measure([folder], device="cpu", **short)
    found = {one.name: one.value for one in report.models[0].measurements}
    counted = numbers_of(open_source(folder, packed=True))
    assert found["parameters/total"] == inspect(folder)["parameters"]["total"] == counted
    assert found["bytes/disk"] < 2 * counted  # few bits, beside an embedding in float32
    assert load(folder).complete("The fox", max_new_tokens=2)


@pytest.mark.slow
def test_it_computes_the_same_in_transformers(folder: Path) -> None:
    model = load_model(open_source(folder, packed=True), torch.float32)
    found = PLAIN.parity(folder, reference_of(model, ids_of(nano_tokenizer(), 1024)))
    assert found.opens == "yes", found.reason


def test_its_tensors_are_checked_as_others_are(folder: Path, tmp_path: Path) -> None:
    model, packing = rounded("symmetric")
    save_packed(model, packing, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for change, said in (
        ({"stray.weight_packed": torch.zeros(1)}, "unexpected: stray.weight_packed"),
        ({"model.norm.weight": torch.zeros(3)}, r"wrong shape: model.norm.weight \[3\]"),
    ):
        save_file({**tensors, **change}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            open_source(tmp_path / "packed", packed=True)
    save_file({key: one for key, one in tensors.items() if not key.startswith(name)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        open_source(tmp_path / "packed", packed=True)
