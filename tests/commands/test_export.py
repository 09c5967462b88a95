"""`compresso export`: the file is what the folder holds, is opened by the engine, and is not left behind if it should
not be.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Call
from tests.formats.nano_variants import nano_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from compresso import cli
from compresso.arch.base import arch_for
from compresso.commands import export as exporting
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.engines import llama_cpp, llama_quantize
from compresso.engines.llama_quantize import KINDS
from compresso.engines.onnx_runtime import OnnxEngine
from compresso.engines.parity import Parity
from compresso.errors import CheckpointError, ExportError
from compresso.formats import gguf, gguf_tensors, onnx
from compresso.formats.hf import save_checkpoint

reader = pytest.importorskip("gguf", reason="gguf: not installed")
onnx_is_there = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))


def engine(test: Callable[..., None]) -> Callable[..., None]:
    """A test that opens what it wrote in llama.cpp."""
    return pytest.mark.slow(
        pytest.mark.skipif(llama_cpp.missing() is not None, reason=f"llama.cpp: {llama_cpp.missing()}")(test)
    )


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nano.gguf"
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(nano.path()), "--format", "gguf", "--output", str(path), "--dtype", "q8_0", "--json"])
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["arch"], told["dtype"], told["bytes"]) == ("llama", "q8_0", path.stat().st_size)
    assert {one.tensor_type.name for one in reader.GGUFReader(path).tensors} == {"F32", "Q8_0"}
    if llama_cpp.missing() is None:
        assert told["checked"] == "opened in llama.cpp"
        assert told["difference"] < 0.05
    else:
        assert told["checked"] == f"not opened: {llama_cpp.missing()}"


@pytest.mark.slow
@pytest.mark.skipif(not onnx_is_there, reason="onnxruntime: it or onnxscript is not installed")
@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_onnx_is_written_and_opened(dtype: str, tiny_folder: Path, tmp_path: Path, call: Call) -> None:
    code, out, error = call(
        "export", tiny_folder, "--format", "onnx", "--output", tmp_path / "onnx", "--dtype", dtype, "--json"
    )
    assert code == 0, error
    told = json.loads(out)
    assert (told["checked"], told["dtype"]) == ("opened in ONNX Runtime", dtype)
    assert told["bytes"] == (tmp_path / "onnx" / "model.onnx").stat().st_size
    assert told["difference"] < (1e-3 if dtype == "f32" else 10)
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


@pytest.mark.skipif(not onnx_is_there, reason="onnxruntime: it or onnxscript is not installed")
def test_an_onnx_folder_that_reads_back_differently_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Program:
        """What torch's exporter returns, for the check to be what is tested."""

        def save(self, path: str, external_data: bool) -> None:
            Path(path).write_bytes(b"a graph")

    monkeypatch.setattr(onnx, "_traced", lambda *_: Program())
    monkeypatch.setattr(OnnxEngine, "parity", lambda *_: Parity("ONNX Runtime", "no", "logits differ by up to 2"))
    with pytest.raises(
        ExportError, match=r"onnx would read back differently in ONNX Runtime: logits differ by up to 2"
    ):
        exporting.export(nano.path(), tmp_path / "onnx", format="onnx")
    assert not list(tmp_path.iterdir())


@engine
def test_a_file_that_reads_back_differently_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda tensor, size, heads=0: _maker(tensor, size)  # noqa: E731 - rows of q and k in transformers' order
    _maker = gguf_tensors._maker
    monkeypatch.setattr(gguf_tensors, "_maker", wrong)
    path = tmp_path / "nano.gguf"
    path.write_bytes(b"GGUF of old, general.written_by compresso export")
    with pytest.raises(
        ExportError, match=r"nano\.gguf would read back differently in llama\.cpp: probabilities differ"
    ):
        exporting.export(nano.path(), path, format="gguf", dtype="f32", overwrite=True)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [
        ("nano.gguf", "GGUF of old, general.written_by compresso export")
    ]


def test_bad_input_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="format='ggml' is unknown; did you mean 'gguf'"):
        exporting.export(nano.path(), tmp_path / "x", format="ggml")
    with pytest.raises(ExportError, match="unknown dtype 'q4'"):
        exporting.export(nano.path(), tmp_path / "x", format="gguf", dtype="q4")
    (tmp_path / "there").write_text("")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        exporting.export(nano.path(), tmp_path / "there", format="gguf")
    monkeypatch.setattr(gguf.importlib, "import_module", _absent)
    with pytest.raises(ExportError, match="pip install gguf"):
        exporting.export(nano.path(), tmp_path / "x", format="gguf")


def _absent(name: str, package: str | None = None) -> object:
    """Imports anything but the library."""
    if name.partition(".")[0] == "gguf":
        raise ImportError(name)
    return __import__(name, fromlist=["any"])


def quantizer(folder: Path, words: str) -> None:
    """A stand-in for llama-quantize: what it is asked goes into a file, and a copy of its input is its output, or
    nothing.
    """
    folder.mkdir()
    script = folder / "llama-quantize"
    script.write_text(f'#!/bin/sh\necho "$3" > {folder}/asked\n{words}\n')
    script.chmod(0o755)


def test_k_quants_are_left_to_llama_quantize_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer(tmp_path / "bin", 'cp "$1" "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    told = exporting.export(nano.path(), tmp_path / "nano.gguf", format="gguf", dtype="q4_k_m")
    assert (tmp_path / "bin" / "asked").read_text() == "Q4_K_M\n"
    assert {one.tensor_type.name for one in reader.GGUFReader(tmp_path / "nano.gguf").tensors} == {
        "F32",
        "F16",
    }  # the copy
    assert told["dtype"] == "q4_k_m" and told["bytes"] == (tmp_path / "nano.gguf").stat().st_size
    assert "hidden size 192: no multiple of 256, so that matrix falls back to a larger type" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "nano.gguf"]


@engine
@pytest.mark.skipif(llama_cpp.shared_library() is None, reason="llama.cpp: node-llama-cpp brings no library here")
@pytest.mark.parametrize("dtype", KINDS)
def test_k_quants_are_made_by_llama_cpp_and_open_in_it(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of different widths, one without an FFN;
    inputs that are multiples of 256 get the kind that was asked for.
    """
    which = shutil.which
    monkeypatch.setattr(llama_quantize.shutil, "which", lambda name: None if name == "llama-quantize" else which(name))
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    plan = Plan({"layers.0.channels": tuple(range(256)), "mlp": (0, 2), "layers.2.heads": (0, 1, 2)})
    arch = arch_for(config)
    shrink_(model, arch.axes(model), plan)
    save_checkpoint(model, arch.shapes(model), tmp_path / "model", tokenizer=nano_tokenizer())
    path = tmp_path / "model.gguf"
    told = exporting.export(tmp_path / "model", path, format="gguf", dtype=dtype)
    assert (told["checked"], told["arch"]) == ("opened in llama.cpp", "deci") and told["difference"] < 0.05
    kinds = {one.name: one.tensor_type.name for one in reader.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"].startswith(f"Q{dtype[1]}_K") and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.2.attn_output.weight"][-1] in "01"  # six heads of 32: no multiple of 256, so it fell back


def test_k_quants_that_fail_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "shared_library", lambda: None)
    with pytest.raises(
        ExportError,
        match=(
            r"q4_k_m is made by llama\.cpp, and neither llama-quantize is on the PATH nor node-llama-cpp is installed"
        ),
    ):
        exporting.export(nano.path(), tmp_path / "nano.gguf", format="gguf", dtype="q4_k_m")
    quantizer(tmp_path / "bin", "echo no such type >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ExportError, match=r"llama\.cpp could not write q6_k \(3\): no such type"):
        exporting.export(nano.path(), tmp_path / "nano.gguf", format="gguf", dtype="q6_k")
    (tmp_path / "nano.gguf").write_text("old")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        exporting.export(nano.path(), tmp_path / "nano.gguf", format="gguf", dtype="q6_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "nano.gguf"]


def test_vllm_deci_is_written_and_said_to_be_unopened(tmp_path: Path, call: Call) -> None:
    code, out, error = call("export", nano.path(), "--format", "vllm-deci", "--output", tmp_path / "deci")
    assert code == 0, error
    assert "arch DeciLM" in out and "not opened: vllm is not installed" in out
    assert (tmp_path / "deci" / "configuration_decilm.py").is_file() and (
        tmp_path / "deci" / "tokenizer.json"
    ).is_file()
    with pytest.raises(ExportError, match="dtype='f32': vllm-deci keeps the stored one"):
        exporting.export(nano.path(), tmp_path / "other", format="vllm-deci", dtype="f32")


@pytest.mark.parametrize("format", ["onnx", "vllm-deci", "compressed-tensors"])
def test_a_folder_is_not_written_into_the_model(format: str, tiny_folder: Path) -> None:
    before = sorted(tiny_folder.rglob("*"))
    with pytest.raises(CheckpointError, match="lies in the folder of the input model"):
        exporting.export(tiny_folder, tiny_folder / "out", format=format)
    assert sorted(tiny_folder.rglob("*")) == before
