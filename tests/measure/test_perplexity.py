"""Perplexity against a plain forward over each block, on a tiny random LLaMA."""

import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresso.data import nano
from compresso.data.world import documents
from compresso.errors import DataError
from compresso.measure.perplexity import perplexity


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano.path())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(16, 1), (16, 4), (64, 8), (400, 2), (5000, 3)])
def test_equal_to_one_block_at_a_time(model, tokenizer, seq_len: int, batch_size: int):
    texts = list(documents(12, 4))
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    total, n = 0.0, 0
    for begin in range(0, len(stream), seq_len):
        block = stream[begin : begin + seq_len]
        with torch.no_grad():
            chances = model(torch.tensor([block])).logits[0].log_softmax(-1)
        for i, token in enumerate(block[1:]):
            total -= chances[i, token].item()
            n += 1
    result = perplexity(model, tokenizer, iter(texts), seq_len, batch_size)
    assert (result.n_tokens, result.seq_len, result.n_texts) == (n, seq_len, 12)
    assert result.value == pytest.approx(math.exp(total / n), rel=1e-4)
    assert "blocks" in result.protocol


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model, tokenizer):
    blank = LlamaForCausalLM(model.config)
    with torch.no_grad():
        blank.lm_head.weight.zero_()
    assert perplexity(blank, tokenizer, documents(5, 1), 32, 4).value == pytest.approx(len(tokenizer), rel=1e-5)


def test_bad_input_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="seq_len=1"):
        perplexity(model, tokenizer, ["A text."], 1, 4)
    with pytest.raises(DataError, match="too few"):
        perplexity(model, tokenizer, [], 16, 4)
