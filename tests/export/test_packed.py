"""Packed checkpoints open in plain transformers and compute the same; the library is optional, and its absence is said."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compresso.core.rounding import fit
from compresso.errors import ExportError
from compresso.export.packed import save_packed

THERE = importlib.util.find_spec("compressed_tensors") is not None
has_library = pytest.mark.skipif(not THERE, reason="needs compressed-tensors")
LINEARS = [f"model.layers.{i}.{name}_proj" for i in range(2) for name in ("self_attn.q", "self_attn.v", "mlp.up", "mlp.down")]


def tiny(bits: int = 0, group: int = 0) -> LlamaForCausalLM:
    """A tied model with rounded linears; others keep all their bits."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, tie_word_embeddings=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for name in LINEARS if bits else ():
        weight = model.get_submodule(name).weight.data
        weight.copy_(fit(weight, bits, group=group, symmetric=True).round(weight))
    return model


@has_library
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 16), (3, 0), (8, 16)])
def test_a_packed_checkpoint_opens_and_computes_the_same(tmp_path: Path, bits: int, group: int) -> None:
    model = tiny(bits, group)
    save_packed(model, LINEARS, tmp_path / "packed", bits=bits, group=group)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "dense")
    small, large = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "dense"))
    assert small < large


@has_library
def test_weights_on_no_grid_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"q_proj does not lie on a symmetric grid of 4 bits"):
        save_packed(tiny(), LINEARS, tmp_path / "packed", bits=4)
    assert not (tmp_path / "packed").exists()


@pytest.mark.skipif(THERE, reason="compressed-tensors is installed")
def test_without_the_library_it_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"pip install compressed-tensors==0\.20\.0"):
        save_packed(tiny(4), LINEARS, tmp_path / "packed", bits=4)
