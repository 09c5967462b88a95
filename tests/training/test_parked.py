"""A parked model takes no memory, and comes back bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.training.parked import parked_


def tied() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)).eval()


def test_a_model_is_empty_within_and_itself_behind(tmp_path: Path) -> None:
    model, ids = tied().bfloat16(), torch.arange(9).unsqueeze(0)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    logits = model(ids).logits
    with parked_(model, tmp_path / "new" / "student.safetensors"):
        assert not sum(parameter.numel() for parameter in model.parameters())
        assert (tmp_path / "new" / "student.safetensors").stat().st_size > 0
    assert not list((tmp_path / "new").iterdir())
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, logits)


def test_it_comes_back_when_what_is_within_fails(tmp_path: Path) -> None:
    layer = nn.Linear(3, 4)
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="within"), parked_(layer, tmp_path / "file"):
        raise ValueError("within")
    assert torch.equal(layer.weight, weight) and not list(tmp_path.iterdir())


def test_tensors_over_the_same_memory_stay_so(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    layer.bias.data = layer.weight.data[0]
    other = nn.Sequential(layer, nn.Linear(4, 2))
    with parked_(other, tmp_path / "file"):
        assert layer.weight.numel() == 16 and not other[1].weight.numel()
    layer.weight.data.zero_()
    assert not layer.bias.any()
