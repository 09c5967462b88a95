"""Which engines open a checkpoint: a native one, a uniform one, one with a stranger's code, and one that an engine
would misread.

The native one is opened in all engines, each a process of seconds; the others only in those where they differ.
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.conftest import Call
from tests.formats.nano_variants import nano_tokenizer, pruned_nano
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import compresso.engines
from compresso.arch.base import arch_for
from compresso.checkpoint.code import trusted
from compresso.checkpoint.source import open_source
from compresso.engines import llama_cpp, registry
from compresso.engines import verify as verify_module
from compresso.engines.llama_cpp import LLAMA_CPP
from compresso.engines.onnx_runtime import ONNX
from compresso.engines.parity import (
    ALWAYS,
    Engine,
    Format,
    Listed,
    Parity,
    Reference,
    ids_of,
    judged,
    reference_of,
    within_rounding,
)
from compresso.engines.transformers import OWN, PLAIN, REMOTE, WITHIN
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.engines.verify import parities, parity_records, verify
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint
from compresso.report.facts import filled

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ZEROS = Reference(torch.arange(3), torch.zeros(3, 1024), torch.arange(3))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "native"
    model = pruned_nano(keep=0.7, attention=(3,), mlp=(2,))
    assert save_checkpoint(model, arch_for(model.config).shapes(model), folder, tokenizer=nano_tokenizer()) == "native"
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("real_processes")
def test_a_native_checkpoint_needs_compresso_or_its_own_code(native: Path) -> None:
    found = {one.engine: one for one in verify(native)}
    assert found[PLAIN.name].opens == "no"
    assert (
        "The repository this folder contains custom code" in found[PLAIN.name].reason
        and str(native) not in found[PLAIN.name].reason
    )
    for engine in (OWN, REMOTE):
        assert (found[engine.name].opens, found[engine.name].same_tokens) == ("yes", NEW_TOKENS)
        assert found[engine.name].difference == pytest.approx(0, abs=1e-4)
    in_llama_cpp = found[LLAMA_CPP.name]
    if llama_cpp.missing() is None and in_llama_cpp.opens != "not installed":
        assert (in_llama_cpp.opens, in_llama_cpp.same_tokens) == ("yes", NEW_TOKENS)
        assert in_llama_cpp.difference == pytest.approx(0, abs=1e-4)
    else:
        assert in_llama_cpp.opens == "not installed"
        assert "install" in in_llama_cpp.reason
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        assert (found[ONNX.name].opens, found[ONNX.name].same_tokens) == ("yes", NEW_TOKENS)
        assert found[ONNX.name].difference == pytest.approx(0, abs=1e-3)  # of logits up to 30
    else:
        assert found[ONNX.name].opens == "not installed"
    assert {found[name].opens for name in ("compressed-tensors, packed", "vLLM")} <= {
        "not installed",
        "not checked",
    }


@dataclass(frozen=True)
class Made:
    """An engine that says what it is told to, of what was written for it."""

    name: str
    says: Literal["yes", "no"] = "yes"
    absent: str | None = None
    listed: Listed = ALWAYS
    reads: Format = Format.DECI
    program: str = "made"
    command: str = ""

    def missing(self) -> str | None:
        return self.absent

    def parity(self, written: Path, reference: Reference) -> Parity:
        assert (written / "config.json").is_file()
        return Parity(self.name, self.says, difference=float(len(reference.ids)))


def test_an_engine_is_listed_where_it_could_be_run_or_says_why_not(native: Path, tmp_path: Path) -> None:
    """One format is written for all that read it, and nothing is left of it."""
    engines: list[Engine] = [Made("a"), Made("b", absent="not here"), Made("c", "no"), Made("d", absent="nor here")]
    engines[3] = Made("d", absent="nor here", listed=Listed(if_absent=False))
    found = parities(Format.DECI, engines, open_source(native), ZEROS, tmp_path)
    assert [(one.engine, one.opens) for one in found] == [("a", "yes"), ("b", "not installed"), ("c", "no")]
    assert found[0].difference == 3 and found[1].reason == "not here"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "names"), [("yes", ["a"]), ("no", ["a", "b"])])
def test_an_engine_instead_of_another_is_run_where_that_one_says_no(
    first: Literal["yes", "no"], names: list[str], native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = (Made("a", first, reads=Format.CHECKPOINT), Made("b", listed=Listed(instead_of="a")))
    monkeypatch.setattr(registry, "engines", lambda: engines)
    assert [one.engine for one in verify(native)] == names


def test_what_a_format_does_not_hold_is_a_no(tmp_path: Path) -> None:
    """Without a tokenizer there is no GGUF file, and no engine is started."""
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "plain")
    (found,) = parities(Format.GGUF, [Made("x", reads=Format.GGUF)], open_source(tmp_path / "plain"), ZEROS, tmp_path)
    pytest.importorskip("gguf", reason="gguf: not installed")
    assert (found.opens, found.reason) == ("no", "it has no tokenizer, which a GGUF file wants")


def test_every_engine_has_a_name_of_its_own_and_the_card_its_commands() -> None:
    engines = registry.engines()
    assert len({engine.name for engine in engines}) == len(engines)
    assert {engine.program for engine in engines} == {
        "transformers",
        "transformers 4.57",
        "llama.cpp",
        "ONNX Runtime",
        "OpenVINO",
        "vLLM",
    }
    assert {engine.reads for engine in engines} == set(Format)
    assert [engine.name for engine in engines][:3] == [PLAIN.name, OWN.name, REMOTE.name]
    for name, command in registry.commands().items():
        assert "{" not in filled(command, "folder", " --code"), name
        assert "folder" in filled(command, "folder", ""), name


def test_a_module_that_lists_an_engine_is_all_that_another_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up.py").write_text(
        "from tests.engines.test_verify import Made\nENGINES = (Made('made up', command='open {folder}'),)\n"
    )
    monkeypatch.setattr(compresso.engines, "__path__", [*compresso.engines.__path__, str(tmp_path)])
    registry.engines.cache_clear()
    try:
        assert "made up" in {engine.name for engine in registry.engines()}
        assert registry.commands()["made up"] == "open {folder}"
    finally:
        registry.engines.cache_clear()
        sys.modules.pop("compresso.engines.made_up", None)


def test_strange_code_does_not_run(native: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "strange"
    folder.mkdir()
    for file in native.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert trusted(folder)
    code = folder / "modeling_compresso.py"
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    found = REMOTE.parity(folder, ZEROS)
    assert found.opens == "not checked"
    assert "not run" in found.reason
    assert not ran.exists()
    code.write_bytes((native / code.name).read_bytes())
    assert trusted(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"somebody/else--{value}" for key, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="auto_map names code to run"):
        trusted(folder)
    found = REMOTE.parity(folder, ZEROS)
    assert found.opens == "not checked" and "auto_map names code to run" in found.reason


@pytest.mark.slow
def test_a_uniform_checkpoint_opens_without_compresso(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.save_pretrained(tmp_path / "plain")
    reference = reference_of(model, torch.arange(1, 9))
    found = PLAIN.parity(tmp_path / "plain", reference)
    assert (found.opens, found.same_tokens) == ("yes", NEW_TOKENS)
    other = reference.logits.clone()
    other[3, 5] += 0.01
    assert not within_rounding(other, reference.logits, WITHIN["f32"])
    found = PLAIN.parity(tmp_path / "plain", replace(reference, logits=other))
    assert found.opens == "no" and found.reason.startswith("logits differ by up to 0.01")
    assert PLAIN.parity(tmp_path / "plain", replace(reference, logits=other, rounding=0.1)).opens == "yes"


def test_what_computes_something_else_is_a_no() -> None:
    found = judged("engine", 0.5, False, [1, 2, 3], [1, 9, 3], "logits")
    assert (found.opens, found.same_tokens, found.reason) == ("no", 1, "logits differ by up to 0.5")


@pytest.mark.slow
@pytest.mark.skipif(llama_cpp.missing() is not None, reason=f"llama.cpp: {llama_cpp.missing()}")
def test_a_file_of_another_model_is_a_no(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf: not installed")
    from compresso.formats.gguf import save_gguf

    model = pruned_nano()
    path = tmp_path / "m.gguf"
    save_gguf(model, arch_for(model.config).shapes(model), path, nano_tokenizer(), "f32")
    ids = ids_of(nano_tokenizer(), model.config.vocab_size)
    assert LLAMA_CPP.parity(path, reference_of(model, ids)).opens == "yes"
    for layer in model.model.layers:  # what a wrong order of rows would do
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.roll(1, 0)
    assert LLAMA_CPP.parity(path, reference_of(model, ids)).opens == "no"


def test_only_models_with_weights_and_a_head(native: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights to verify\. Give a folder of safetensors or"):
        verify(native / "config.json")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"base \(bert\) has no head, and engines are compared by the logits"):
        verify(tmp_path / "base")


def test_ids_without_tokenizer_are_in_the_vocabulary() -> None:
    assert int(ids_of(None, 5).max()) < 5
    assert int(ids_of(nano_tokenizer(), 5).max()) < 5, "ids of a tokenizer that writes more than the model has"
    assert ids_of(nano_tokenizer(), 1024).dtype == torch.long


@pytest.mark.slow
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
    assert list(found)[:3] == [PLAIN.name, OWN.name, REMOTE.name] and {found[engine] for engine in list(found)[:3]} == {
        "yes"
    }
    assert all(
        any(line.startswith(engine) and opens in line for line in out.splitlines()) for engine, opens in found.items()
    )
    packed = "yes" if importlib.util.find_spec("compressed_tensors") else "not installed"
    assert found["compressed-tensors, packed"] == packed  # it was asked with what the records will say
    card, report = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "| vLLM | " in card and "What the engines of the machine that made it said" in report
    for engine, command in (
        (ONNX.name, "--format onnx"),
        (LLAMA_CPP.name, "--format gguf"),
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
    monkeypatch.setattr(verify_module, "verify", lambda folder: [Parity("llama.cpp, as GGUF", "no", said)])
    assert parity_records(native)[0]["reason"] == "a temporary file does not open in llama.cpp, which refuses it: no"


def test_where_memory_does_not_suffice_it_says_so(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "available", lambda device: 1000)
    found = parity_records(native)
    assert {one["opens"] for one in found} == {"not checked"} and len(found) == 3
    assert "two copies in float32 need 0.0 GB" in found[0]["reason"]
