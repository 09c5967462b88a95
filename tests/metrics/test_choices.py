"""Choice accuracy against a plain forward of one sequence at a time, on a tiny random LLaMA."""

import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresso.data import nano
from compresso.data.prompt import body
from compresso.data.world import Item, items
from compresso.errors import DataError
from compresso.metrics.choices import _log_likelihoods, choice_accuracy


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
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


SAMPLE = [item for task in ("fact", "date", "boolean") for item in items(task, 12, 5)]


def _by_hand(model, tokenizer, item: Item, prompt: str) -> list[float]:
    totals = []
    for choice in item.choices:
        context = tokenizer(prompt + body(item.instruction, item.input))["input_ids"]
        target = tokenizer(choice, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([context + target])
        with torch.no_grad():
            chances = model(ids).logits[0].log_softmax(-1)
        totals.append(sum(chances[len(context) + i - 1, token].item() for i, token in enumerate(target)))
    return totals


@pytest.mark.parametrize("prompt", ["", "You are being pruned.\n\n"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equal_to_one_sequence_at_a_time(model, tokenizer, prompt: str, batch_size: int):
    expected = [_by_hand(model, tokenizer, item, prompt) for item in SAMPLE]
    right = [scores.index(max(scores)) == item.answer for scores, item in zip(expected, SAMPLE, strict=True)]
    result = choice_accuracy(model, tokenizer, SAMPLE, prompt=prompt, batch_size=batch_size)
    assert result.n == len(SAMPLE)
    assert result.accuracy == sum(right) / len(right)
    assert result.stderr == pytest.approx(math.sqrt(result.accuracy * (1 - result.accuracy) / result.n))
    for number, task in enumerate(("fact", "date", "boolean")):
        assert result.tasks[task] == sum(right[12 * number : 12 * number + 12]) / 12
        assert result.n_by_task[task] == 12


def test_likelihoods_are_equal_to_one_sequence_at_a_time(model, tokenizer):
    rows, expected = [], []
    for item in SAMPLE:
        context = tokenizer(body(item.instruction, item.input))["input_ids"]
        for choice in item.choices:
            target = tokenizer(choice, add_special_tokens=False)["input_ids"]
            rows.append((context + target, len(target)))
        expected += _by_hand(model, tokenizer, item, "")
    torch.testing.assert_close(
        torch.tensor(_log_likelihoods(model, rows, 10)), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


def test_a_model_that_knows_one_answer_is_right_about_it(model, tokenizer):
    item = SAMPLE[0]
    best = _by_hand(model, tokenizer, item, "")
    known = Item(item.task, item.instruction, item.input, item.choices, best.index(max(best)))
    wrong = Item(item.task, item.instruction, item.input, item.choices, best.index(min(best)))
    assert choice_accuracy(model, tokenizer, [known]).accuracy == 1
    assert choice_accuracy(model, tokenizer, [wrong]).accuracy == 0


def test_the_mode_of_the_model_is_left_as_it_was(model, tokenizer):
    for mode in (True, False):
        model.train(mode)
        choice_accuracy(model, tokenizer, SAMPLE[:2])
        assert model.training is mode


def test_no_items_and_empty_choices_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="no items"):
        choice_accuracy(model, tokenizer, [])
    with pytest.raises(DataError, match="empty choice"):
        choice_accuracy(model, tokenizer, [Item("fact", "What?", "", ("A.", ""), 0)])


def test_tokens_without_a_row_are_refused(model, tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(nano.path())
    other.add_special_tokens({"bos_token": "<begin>"})
    with pytest.raises(DataError, match=rf"token id {len(tokenizer)} is beyond the model's vocabulary"):
        choice_accuracy(model, other, SAMPLE[:2])
