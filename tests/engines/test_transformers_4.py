"""Checkpoints in a real transformers 4.57: the same logits, greedy tokens and token ids as here, whatever turns the
positions; per-layer folders are refused there, and the card says so.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoint.test_packed import rounded
from tests.formats.nano_variants import nano_tokenizer, pruned_nano
from tests.formats.test_config_text import CASES, made
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.engines import transformers_4
from compresso.engines.parity import ids_of, reference_of
from compresso.engines.transformers_4 import Transformers4
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.formats.config_text import config_text, older_obstacle
from compresso.formats.hf import save_checkpoint
from compresso.formats.packed import save_packed

MISSING = transformers_4.missing()
there = pytest.mark.skipif(MISSING is not None, reason=f"transformers 4.57: {MISSING}")
SCRIPT = Path(transformers_4.__file__).with_name("transformers_4_process.py")
QUIET = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4,
}
"""Lengths that a text of a dozen tokens goes beyond."""


def real(function: Any) -> Any:
    """A test that runs a real transformers 4.57."""
    return there(pytest.mark.transformers_4(function))


def as_version_4_wrote_it(folder: Path) -> Path:
    """A model with llama3's rotary embedding, in the older spelling alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters"), config.pop("dtype")
    config |= {"torch_dtype": "float32", "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.45.0"}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.slow
@real
def test_a_pruned_model_with_llama3_s_rotary_embedding_computes_the_same_there(tmp_path: Path) -> None:
    source = open_source(as_version_4_wrote_it(tmp_path / "given"))
    model = load_model(source)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    shrink_(model, axes, Plan({axis.name: tuple(range(axis.size // 2)) for axis in axes if axis.kind == "channel"}))
    save_checkpoint(model, arch.shapes(model), tmp_path / "out", "uniform", nano_tokenizer(), source=source.folder)
    reference = reference_of(model, ids_of(nano_tokenizer(), 1024))
    found = Transformers4().parity(tmp_path / "out", reference)
    assert (found.opens, found.same_tokens) == ("yes", NEW_TOKENS), found.reason
    assert found.difference == pytest.approx(0, abs=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": None}))
    found = Transformers4().parity(tmp_path / "out", reference)
    assert (found.opens, found.reason[:14]) == ("no", "logits differ ")  # what was written before, and nothing said


@pytest.mark.slow
@real
def test_every_rotary_embedding_computes_the_same_there(tmp_path: Path) -> None:
    """All in one process, as each costs seconds."""
    ids = torch.arange(50) % 64
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    wanted: dict[str, torch.Tensor] = {}
    for case in CASES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(made(case)).float().eval()
        model.save_pretrained(tmp_path / case)
        (tmp_path / case / "config.json").write_text(config_text(model.config))
        wanted[case] = reference_of(model, ids).logits
    code = f"import runpy; main = runpy.run_path({str(SCRIPT)!r})['main']\n"
    code += f"for case in {list(CASES)}: main(case, 'ids.safetensors', case + '/logits.safetensors', '')"
    python = str(transformers_4.python())
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, logits in wanted.items():
        found = load_file(tmp_path / case / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.slow
@real
def test_a_native_checkpoint_does_not_open_there_as_its_card_says(tmp_path: Path) -> None:
    model = pruned_nano(keep=0.8)
    shapes = arch_for(model.config).shapes(model)
    assert save_checkpoint(model, shapes, tmp_path / "out", tokenizer=nano_tokenizer()) == "native"
    assert older_obstacle(json.loads((tmp_path / "out" / "config.json").read_text())) is not None
    found = Transformers4().parity(tmp_path / "out", reference_of(model, ids_of(nano_tokenizer(), 1024)))
    assert found.opens == "no" and "custom code" in found.reason and str(tmp_path) not in found.reason


@real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of compressed-tensors
@pytest.mark.parametrize(
    ("how", "opens", "said"),
    [
        ("symmetric", "yes", "and 4.57 where it knows model_type llama"),
        ("asymmetric", "no", "4.57 does not unpack its zero points"),
        ("w8a8", "no", "4.57 opens it and rounds activations"),
    ],
)
def test_the_card_of_packed_weights_is_true_there(how: str, opens: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors: not installed")
    model, packing = rounded(how)
    save_packed(model, packing, tmp_path / "packed", tokenizer=nano_tokenizer())
    assert said in " ".join((tmp_path / "packed" / "README.md").read_text().split())
    found = Transformers4().parity(tmp_path / "packed", reference_of(model, ids_of(nano_tokenizer(), 1024)))
    assert found.opens == opens, found.reason
    assert ("logits differ" in found.reason) is (how == "w8a8")


@pytest.mark.slow
@real
def test_a_tokenizer_that_reads_otherwise_is_a_no(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out", tokenizer=nano_tokenizer())
    reference = reference_of(model, torch.arange(1, 13))
    found = Transformers4().parity(tmp_path / "out", reference)
    assert found.opens == "no" and "has ids" in found.reason


def test_where_it_is_not_here_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("COMPRESSO_TRANSFORMERS_4_PYTHON", raising=False)
    assert "COMPRESSO_TRANSFORMERS_4_PYTHON can name the Python" in str(transformers_4.missing())
    monkeypatch.setenv("COMPRESSO_TRANSFORMERS_4_PYTHON", str(tmp_path / "none"))
    assert str(transformers_4.missing()).endswith("none is no file")
    (tmp_path / "lib" / "python3" / "site-packages" / "transformers").mkdir(parents=True)
    inside = tmp_path / "transformers-4" / "lib" / "python3.11" / "site-packages" / "transformers"
    inside.mkdir(parents=True)
    (inside / "__init__.py").touch()
    monkeypatch.delenv("COMPRESSO_TRANSFORMERS_4_PYTHON")
    assert transformers_4.missing() is None
