"""Packed checkpoints open in plain transformers and compute the same;
the library is optional, and its absence is said.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compresso.core.rounding import fit
from compresso.edit.round_inputs import Range, round_inputs_
from compresso.errors import ExportError
from compresso.formats.packed import save_packed
from compresso.formats.packing import Packing

THERE = importlib.util.find_spec("compressed_tensors") is not None
has_library = pytest.mark.skipif(not THERE, reason="compressed-tensors: not installed")
LINEARS = tuple(
    f"model.layers.{i}.{name}_proj" for i in range(2) for name in ("self_attn.q", "self_attn.v", "mlp.up", "mlp.down")
)


def tiny(bits: int = 0, group: int = 0, symmetric: bool = True) -> LlamaForCausalLM:
    """A tied model with rounded linears; others keep all their bits."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for name in LINEARS if bits else ():
        weight = model.get_submodule(name).weight.data
        weight.copy_(fit(weight, bits, group=group, symmetric=symmetric).round(weight))
    return model


@has_library
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 16), (3, 0), (8, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_checkpoint_opens_and_computes_the_same(
    tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    model = tiny(bits, group, symmetric)
    save_packed(model, Packing(LINEARS, bits, group, symmetric), tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "dense")
    small, large = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "dense"))
    assert small < large


@has_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inputs", ["token", "tensor"])
@torch.no_grad()
def test_activations_are_rounded_where_the_folder_says_so(tmp_path: Path, inputs: Range) -> None:
    model, ids = tiny(8), torch.arange(3, 40).unsqueeze(0)
    exact = model(input_ids=ids).logits
    save_packed(model, Packing(LINEARS, 8, inputs=inputs), tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    found = opened(input_ids=ids).logits
    for name in LINEARS:
        torch.testing.assert_close(
            opened.get_submodule(name).weight, model.get_submodule(name).weight, rtol=1e-6, atol=0
        )
    round_inputs_(model, inputs, LINEARS)
    rounded = model(input_ids=ids).logits
    made = float((rounded - exact).abs().max())
    assert 1e-4 < made < 1e-2
    assert 0 < float((found - rounded).abs().max()) < 2 * made  # the library's steps are 1/127.5 of the largest entry
    assert float((found - exact).abs().max()) > 1e-4
    assert all(
        load_file(tmp_path / "packed" / "model.safetensors")[f"{name}.weight"].dtype == torch.int8 for name in LINEARS
    )


@has_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_keeps_the_grid(tmp_path: Path, symmetric: bool) -> None:
    model = tiny(4, 16, symmetric).bfloat16()
    save_packed(model, Packing(LINEARS, 4, 16, symmetric), tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-2)


@has_library
def test_weights_on_no_grid_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"q_proj does not lie on a symmetric grid of 4 bits"):
        save_packed(tiny(), Packing(LINEARS, 4), tmp_path / "packed")
    with pytest.raises(ExportError, match=r"q_proj does not lie on an asymmetric grid of 4 bits in groups of 16"):
        save_packed(tiny(), Packing(LINEARS, 4, 16, symmetric=False), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_without_the_library_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # as if it were not installed
    with pytest.raises(ExportError, match=r"pip install compressed-tensors==0\.20\.0"):
        save_packed(tiny(4), Packing(LINEARS, 4), tmp_path / "packed")
