"""Checkpoints in a real vLLM: layers of different widths as they are written and as DeciLM, few bits, and what it
refuses.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.formats.nano_variants import greedy, nano_tokenizer, pruned_nano
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.code import NATIVE
from compresso.checkpoint.source import open_source
from compresso.commands.export import export
from compresso.core.rounding import fit
from compresso.engines import vllm as vllm_engine
from compresso.engines.parity import Format, reference_of
from compresso.engines.verify import parities
from compresso.engines.vllm import DECI, PACKED, VLLM
from compresso.engines.written import Live
from compresso.errors import ExportError
from compresso.formats.hf import save_checkpoint
from compresso.formats.layout import Layout
from compresso.formats.packed import save_packed
from compresso.formats.packing import Packing
from compresso.formats.vllm_deci import DECI_CLASS

MISSING = vllm_engine.missing()
_CPU = torch.cpu.get_capabilities()
NARROW = pytest.mark.skipif(
    _CPU.get("architecture") == "x86_64" and not _CPU.get("avx512_f"),
    reason="vLLM's kernels for few bits want AVX-512, which this processor has not",
)
there = pytest.mark.skipif(MISSING is not None, reason=f"vLLM: {MISSING}")
IDS = torch.tensor([1, 5, 9, 14, 20, 33, 40])


def real(function: Any) -> Any:
    """A test that runs a real vLLM."""
    return there(pytest.mark.vllm(pytest.mark.slow(function)))


def saved(model: PreTrainedModel, folder: Path, layout: Layout = "native") -> Path:
    save_checkpoint(model, arch_for(model.config).shapes(model), folder, layout=layout, tokenizer=nano_tokenizer())
    return folder


def assert_same(found: vllm_engine.Continued, model: PreTrainedModel) -> None:
    tokens, probabilities = greedy(model, IDS.tolist(), 8)
    assert found.greedy.tolist() == tokens
    torch.testing.assert_close(found.logprobs.exp(), probabilities[0], atol=1e-4, rtol=0)


@real
@pytest.mark.parametrize("variant", [{"keep": 0.8}, {"keep": 0.8, "mlp": (3,)}, {}])
def test_heads_and_channels_of_each_layer_s_own_run_as_they_are_written(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    model = pruned_nano(**variant)
    folder = saved(model, tmp_path / "model", "native" if variant else "uniform")
    assert_same(vllm_engine.continue_ids(folder, IDS, 8, shipped=NATIVE), model)


@real
def test_a_layer_without_attention_runs_as_deci_alone_and_verify_tells(tmp_path: Path) -> None:
    model = pruned_nano(0.7, attention=(2,), mlp=(3,))
    folder = saved(model, tmp_path / "model")
    reference = reference_of(model, IDS)
    found = VLLM.parity(folder, reference)
    assert found.opens == "no" and "does not dispatch through the Transformers attention interface" in found.reason
    (found,) = parities(Format.DECI, [DECI], open_source(folder), reference, tmp_path)
    assert (found.opens, found.same_tokens) == ("yes", 8) and found.difference is not None and found.difference < 1e-3


@real
def test_an_exported_deci_folder_is_opened(tmp_path: Path) -> None:
    model = pruned_nano(0.5)
    facts = export(saved(model, tmp_path / "model"), tmp_path / "deci", format="vllm-deci")
    assert facts["checked"] == "opened in vLLM" and facts["same_tokens"] == 8 and facts["difference"] < 1e-3
    assert_same(vllm_engine.continue_ids(tmp_path / "deci", IDS, 8, shipped=DECI_CLASS), model)


@real
@NARROW
@pytest.mark.filterwarnings("ignore")  # of compressed-tensors
@pytest.mark.parametrize(
    "packing",
    [(4, 32, True, None), (4, 32, False, None), (8, 0, True, "token")],
    ids=["symmetric", "asymmetric", "w8a8"],
)
def test_few_bits_run_packed(packing: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors: not installed")
    model = pruned_nano()
    linears = tuple(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name
    )
    bits, group, symmetric, inputs = packing
    for name in linears:
        weight = model.get_submodule(name).weight.data
        weight.copy_(fit(weight, bits, group=group, symmetric=symmetric).round(weight))
    how = Packing(linears, bits, group, symmetric, inputs)
    save_packed(model, how, tmp_path / "packed", tokenizer=nano_tokenizer())
    found = PACKED.parity(tmp_path / "packed", Live(model, nano_tokenizer(), how).reference())
    assert (found.engine, found.opens) == ("vLLM, packed", "yes"), found.reason
    if _CPU.get("amx_tile") and not symmetric and found.same_tokens == 8 and (found.difference or 0) >= 0.05:
        pytest.xfail(f"with AMX asymmetric codes differ by {found.difference}; wanted below .05, cause unknown")
    assert (
        found.same_tokens is not None
        and found.same_tokens >= 1
        and found.difference is not None
        and found.difference < 0.05
    )


@real
def test_what_it_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")  # heads of 8 dimensions: no kernel on CPU
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ExportError, match=r"vLLM does not open it: .*SafetensorError"):
        vllm_engine.continue_ids(tmp_path / "model", IDS, 2)


@pytest.mark.vllm
def test_without_it_what_would_help_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSO_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ExportError, match=r"COMPRESSO_VLLM_PYTHON=.*python is no file"):
        vllm_engine.continue_ids(tmp_path, IDS, 2)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '[rank0]: ValueError: no such kernel' >&2\necho bye >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ExportError, match=r"vLLM does not open it: ValueError: no such kernel$"):
        vllm_engine.continue_ids(tmp_path, IDS, 2)
    monkeypatch.delenv("COMPRESSO_VLLM_PYTHON")
    monkeypatch.setattr(vllm_engine, "_python", lambda: None)
    assert "COMPRESSO_VLLM_PYTHON can name the Python" in str(vllm_engine.missing())
