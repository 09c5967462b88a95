"""Candidates that are let write: the repetition is that of their texts, and no more of them write than needed."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compresso.data import nano
from compresso.metrics.generation import samples
from compresso.metrics.repeats import first_that_writes, repetition_of


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).eval()


def test_the_repetition_is_that_of_continuations_of_the_texts(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    texts = [
        tokenizer(text)["input_ids"] for text in ("the red fox sat", "a small dog ran to the old house and it slept")
    ]
    prompts = [texts[0][: max(len(texts[0]) // 2, 1)], texts[1][: min(16, len(texts[1]) // 2)]]
    written = samples(model, tokenizer, ["0", "1"], 24, lambda place: prompts[int(place)])
    assert repetition_of(model, tokenizer, texts, 24) == sum(one.repetition for one in written) / 2


def test_a_model_that_says_one_word_repeats_itself(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano.path())

    def one_word(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor([77]), 1.0)

    handle = model.get_output_embeddings().register_forward_hook(one_word)
    try:
        assert repetition_of(model, tokenizer, [list(range(5, 30))], 24) == pytest.approx(1 - 1 / 21)
    finally:
        handle.remove()


def test_nobody_writes_after_one_that_does_not_repeat_itself() -> None:
    asked: list[float] = []

    def writing() -> Iterator[float]:
        for value in (0.9, 0.3, 0.1):
            asked.append(value)
            yield value

    assert first_that_writes(writing(), 0.3) == (1, [0.9, 0.3]) and asked == [0.9, 0.3]
    assert first_that_writes([0.9, 0.4, 0.4], 0.3) == (1, [0.9, 0.4, 0.4])
