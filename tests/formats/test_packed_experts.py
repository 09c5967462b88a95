"""Packed experts: a written folder opens in plain transformers and in compresso, and computes the same; what no reader
takes is refused.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import compresso
from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.core.rounding import fit
from compresso.edit.shrink import shrink_
from compresso.engines.parity import reference_of
from compresso.engines.transformers import PACKED
from compresso.errors import ExportError
from compresso.formats.hf import save_checkpoint
from compresso.formats.packed import save_packed
from compresso.formats.packing import Packing
from compresso.native import MOE_FILE
from compresso.sweep.targets import matrix
from tests.methods.test_awq_experts import FAMILIES

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors: not installed"
    ),
    pytest.mark.filterwarnings("ignore"),  # the library's own
]
LINEARS = ("q_proj.weight", "shared_expert.up_proj.weight", "shared_expert.down_proj.weight")
NAMES = {"mixtral": "block_sparse_moe.experts.5.w3", "qwen2_moe": "mlp.experts.3.up_proj"}


def rounded(name: str, bits: int = 4, group: int = 8, symmetric: bool = True) -> tuple[Any, Packing]:
    """A model with rounded experts, q and, where there is one, a shared expert; of unequal sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    names = [n for n, p in model.named_parameters() if p.dim() == 3]
    names += [n.removesuffix(".weight") for n, _ in model.named_parameters() if n.endswith(LINEARS)]
    with torch.no_grad():
        for one in names:
            parameter = dict(model.named_parameters()).get(one)
            each = [one] if parameter is None else [f"{one}.{e}" for e in range(len(parameter))]
            for of in each:
                weight = matrix(model, of)
                weight.copy_(fit(weight, bits, group=group, symmetric=symmetric).round(weight))
    return model, Packing(tuple(names), bits, group, symmetric)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 0)])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "deepseek_v2"])
def test_packed_experts_open_and_compute_the_same(tmp_path: Path, name: str, bits: int, group: int) -> None:
    model, packing = rounded(name, bits, group)
    save_packed(model, packing, tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        written = set(file.keys())
    if name in NAMES:
        assert f"model.layers.1.{NAMES[name]}.weight_packed" in written
    assert not any("gate_up_proj" in one for one in written)
    ignored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(one.endswith(".gate") for one in ignored) and "lm_head" in ignored
    assert not any(".experts." in one for one in ignored)


@torch.no_grad()
def test_it_opens_in_compresso_and_is_smaller(tmp_path: Path) -> None:
    model, packing = rounded("mixtral")
    model = model.bfloat16()
    wide = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    for name, stack in wide.items():  # bfloat16 keeps the grid
        for expert in range(len(stack)):
            weight = matrix(model, f"{name}.{expert}")
            weight.copy_(fit(weight.float(), 4, group=8, symmetric=True).round(weight.float()))
    save_packed(model, packing, tmp_path / "packed")
    model.save_pretrained(tmp_path / "plain")
    small, large = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("packed", "plain"))
    assert small < 0.9 * large
    opened = compresso.load(tmp_path / "packed").model
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(
        opened(input_ids=ids).logits.float(), model.float()(input_ids=ids).logits, rtol=0, atol=2e-2
    )


def test_what_no_reader_takes_is_refused(tmp_path: Path) -> None:
    model, packing = rounded("mixtral", symmetric=False)
    with pytest.raises(ExportError, match=r"passes over zero points of stacked experts; round with symmetric: true"):
        save_packed(model, packing, tmp_path / "packed")
    model, packing = rounded("mixtral")
    some = Packing(tuple(n for n in packing.linears if "layers.1" not in n), 4, 8)
    with pytest.raises(ExportError, match=r"layers.1.mlp.experts.gate_up_proj was not rounded, .* all experts"):
        save_packed(model, some, tmp_path / "packed")
    model, packing = rounded("gpt_oss")
    with pytest.raises(ExportError, match=r"checkpoints of a gpt_oss hold .*gate_up_proj as one stack, which no read"):
        save_packed(model, packing, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@torch.no_grad()
def test_experts_that_were_not_rounded_stay_stacked_beside_packed_linears(tmp_path: Path) -> None:
    model, packing = rounded("mixtral")
    linears = tuple(name for name in packing.linears if ".experts." not in name)
    save_packed(model, Packing(linears, 4, 8), tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_packed_experts_behind_a_layer_that_lost_its_mixture(tmp_path: Path) -> None:
    """A class of ours lies beside them: it opens with compresso imported, and by trust alone (in a fresh process)."""
    model, packing = rounded("mixtral")
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan({"mlp": (1,), "layers.1.experts": (0, 2, 3, 5)}))
    save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    own = load_model(open_source(tmp_path / "out"))
    own.config.auto_map = {"AutoConfig": "owner/name--theirs.Config"}  # as a stranger's folder may have it
    left = tuple(name for name in packing.linears if "layers.0.mlp" not in name)
    save_packed(own, Packing(left, 4, 8), tmp_path / "packed")
    ids = torch.arange(3, 40).unsqueeze(0)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        compresso.load(tmp_path / "packed").model(input_ids=ids).logits, expected, rtol=0, atol=1e-5
    )
    auto_map = json.loads((tmp_path / "packed" / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all(one.startswith(f"{MOE_FILE.stem}.Compresso") for one in auto_map.values())
    assert (tmp_path / "packed" / MOE_FILE.name).read_bytes() == MOE_FILE.read_bytes()
    assert "trust_remote_code=True" in (tmp_path / "packed" / "README.md").read_text()
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert "model.layers.1.block_sparse_moe.experts.3.w3.weight_packed" in written
    assert not any("layers.0.block_sparse_moe" in one or ".experts.4." in one for one in written)
    assert PACKED.parity(tmp_path / "packed", reference_of(model, ids[0], "f32")).opens == "yes"
