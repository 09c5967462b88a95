"""The dtype of a model's numbers."""

import torch
from tests.arch.conftest import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.edit.precision import cast_


def test_what_no_file_holds_keeps_its_dtype() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    before = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
    assert any("inv_freq" in name for name in before)
    kept = list(model.parameters())
    assert cast_(cast_(model, torch.bfloat16), torch.float32) is model
    assert all(mine is own for mine, own in zip(model.parameters(), kept, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name][0] and torch.equal(buffer, before[name][1])
    assert cast_(model, torch.bfloat16).dtype == torch.bfloat16
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_buffers_of_a_checkpoint_go_along_and_whole_numbers_stay() -> None:
    norm = cast_(nn.BatchNorm1d(3), torch.bfloat16)
    assert norm.running_mean is not None and norm.running_mean.dtype == norm.weight.dtype == torch.bfloat16
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.dtype == torch.int64


def test_corrections_of_routers_stay_as_exact_as_checkpoints_open_them() -> None:
    model = build("moe_deepseek")
    found = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert found
    for buffer in found.values():
        buffer.fill_(1 / 3)
    cast_(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name in found:
        kept = model.get_buffer(name)
        assert kept.dtype == torch.float32 and (kept == torch.tensor(1 / 3)).all()
