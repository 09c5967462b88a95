"""Which engines open a checkpoint: a native one, a uniform one, one with a stranger's code, and one that an engine
would misread.

The native one is asked about in all engines, each a process of seconds; the others only in those where they differ.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
import torch
from tests.conftest import Call
from tests.formats.nano_variants import nano_tokenizer, pruned_nano
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.checkpoint.code import trusted
from compresso.checkpoint.source import open_source
from compresso.engines import llama_cpp
from compresso.engines import transformers_process as opened
from compresso.engines import verify as verifying
from compresso.engines.parity import ONNX, OWN, Parity, check_llama_cpp, ids_of, judged, within_rounding
from compresso.engines.verify import verify
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint

PLAIN, REMOTE, GGUF = "transformers", "transformers, trust_remote_code", "llama.cpp, as GGUF"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "native"
    model = pruned_nano(keep=0.7, attention=(3,), mlp=(2,))
    assert save_checkpoint(model, arch_for(model.config).shapes(model), folder, tokenizer=nano_tokenizer()) == "native"
    return folder


def test_a_native_checkpoint_needs_compresso_or_its_own_code(native: Path) -> None:
    answers = {answer.engine: answer for answer in verify(native)}
    assert answers[PLAIN].opens == "no"
    assert (
        "The repository this folder contains custom code" in answers[PLAIN].reason
        and str(native) not in answers[PLAIN].reason
    )
    for engine in (OWN, REMOTE):
        assert (answers[engine].opens, answers[engine].same_tokens) == ("yes", opened.NEW_TOKENS)
        assert answers[engine].difference == pytest.approx(0, abs=1e-4)
    if llama_cpp.missing() is None and answers[GGUF].opens != "not installed":
        assert (answers[GGUF].opens, answers[GGUF].same_tokens) == ("yes", opened.NEW_TOKENS)
        assert answers[GGUF].difference == pytest.approx(0, abs=1e-4)
    else:
        assert answers[GGUF].opens == "not installed"
        assert "install" in answers[GGUF].reason
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        assert (answers[ONNX].opens, answers[ONNX].same_tokens) == ("yes", opened.NEW_TOKENS)
        assert answers[ONNX].difference == pytest.approx(0, abs=1e-3)  # of logits up to 30
    else:
        assert answers[ONNX].opens == "not installed"
    assert {answers[engine].opens for engine in ("compressed-tensors, packed", "vLLM")} <= {
        "not installed",
        "not checked",
    }


def test_strange_code_does_not_run(native: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "strange"
    folder.mkdir()
    for file in native.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert trusted(folder)
    code = folder / "modeling_compresso.py"
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    ids = torch.arange(3)
    answer = verifying._transformers(REMOTE, open_source(folder), ids, torch.zeros(3, 1024), ids, tmp_path)
    assert answer.opens == "not checked"
    assert "not run" in answer.reason
    assert not ran.exists()
    code.write_bytes((native / code.name).read_bytes())
    assert trusted(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"somebody/else--{value}" for key, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="auto_map names code to run"):
        trusted(folder)
    answer = verifying._transformers(REMOTE, open_source(folder), ids, torch.zeros(3, 1024), ids, tmp_path)
    assert answer.opens == "not checked" and "auto_map names code to run" in answer.reason


def test_a_uniform_checkpoint_opens_without_compresso_but_without_tokenizer_not_in_llama_cpp(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    source, ids = open_source(tmp_path / "plain"), torch.arange(1, 9)
    logits, greedy = opened.continued(model, ids)
    answer = verifying._transformers(PLAIN, source, ids, logits, greedy, tmp_path)
    assert (answer.opens, answer.same_tokens) == ("yes", opened.NEW_TOKENS)
    logits[3, 5] += 0.01
    assert not within_rounding(logits, opened.continued(model, ids)[0])
    in_llama_cpp = verifying._llama_cpp(model, None, tmp_path)
    assert in_llama_cpp.opens == "not installed" or "no tokenizer" in in_llama_cpp.reason


def test_what_computes_something_else_is_a_no() -> None:
    answer = judged("engine", 0.5, False, [1, 2, 3], [1, 9, 3], "logits")
    assert (answer.opens, answer.same_tokens, answer.reason) == ("no", 1, "logits differ by up to 0.5")


@pytest.mark.skipif(llama_cpp.missing() is not None, reason=f"llama.cpp: {llama_cpp.missing()}")
def test_a_file_of_another_model_is_a_no(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf: not installed")
    from compresso.formats.gguf import save_gguf

    model = pruned_nano()
    path = tmp_path / "m.gguf"
    save_gguf(model, arch_for(model.config).shapes(model), path, nano_tokenizer(), "f32")
    assert check_llama_cpp(path, model, nano_tokenizer(), "x", 1e-2).opens == "yes"
    for layer in model.model.layers:  # what a wrong order of rows would do
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.roll(1, 0)
    assert check_llama_cpp(path, model, nano_tokenizer(), "x", 1e-2).opens == "no"


def test_only_language_models_with_weights(native: Path) -> None:
    with pytest.raises(CheckpointError, match="causal language model with weights"):
        verify(native / "config.json")


def test_ids_without_tokenizer_are_in_the_vocabulary() -> None:
    assert int(ids_of(None, 5).max()) < 5
    assert ids_of(nano_tokenizer(), 1024).dtype == torch.long


@pytest.mark.engines
def test_a_run_by_command_ends_with_what_the_engines_say(tiny_folder: Path, tmp_path: Path, call: Call) -> None:
    """It stands in the records, the card and the report, with commands for the engines that opened it; --no-verify asks
    none.
    """
    more = ("--set", "stages.rtn.symmetric=true", "--set", "stages.rtn.group=16", "--allow-collapsed")
    code, out, error = call("run", "rtn/4-bit", "--model", tiny_folder, "--output", tmp_path / "out", *more)
    assert code == 0, error
    found = {
        one["engine"]: one["opens"] for one in json.loads((tmp_path / "out" / "records.json").read_text())["engines"]
    }
    assert list(found)[:3] == [PLAIN, OWN, REMOTE] and {found[engine] for engine in (PLAIN, OWN, REMOTE)} == {"yes"}
    assert all(
        any(line.startswith(engine) and opens in line for line in out.splitlines()) for engine, opens in found.items()
    )
    packed = "yes" if importlib.util.find_spec("compressed_tensors") else "not installed"
    assert found["compressed-tensors, packed"] == packed  # it was asked with what the records will say
    card, report = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "| vLLM | " in card and "What the engines of the machine that made it said" in report
    for engine, command in (
        (ONNX, "--format onnx"),
        (GGUF, "--format gguf"),
        ("compressed-tensors, packed", "--format compressed-tensors"),
    ):
        assert (command in card) == (command in report) == (found[engine] == "yes")
    code, out, _ = call(
        "run", "rtn/4-bit", "--model", tiny_folder, "--output", tmp_path / "quiet", *more, "--no-verify"
    )
    assert code == 0 and "vLLM" not in out
    assert json.loads((tmp_path / "quiet" / "records.json").read_text())["engines"] == []


def test_records_name_no_folder_of_this_machine(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"{Path(tempfile.gettempdir(), 'x', 'model.gguf')} does not open in llama.cpp, which refuses it: no"
    monkeypatch.setattr(verifying, "verify", lambda folder: [Parity("llama.cpp, as GGUF", "no", said)])
    assert verifying.engines(native)[0]["reason"] == "a temporary file does not open in llama.cpp, which refuses it: no"


def test_where_memory_does_not_suffice_it_says_so(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "available", lambda device: 1000)
    answers = verifying.engines(native)
    assert {answer["opens"] for answer in answers} == {"not checked"} and len(answers) == 3
    assert "two copies in float32 need 0.0 GB" in answers[0]["reason"]
