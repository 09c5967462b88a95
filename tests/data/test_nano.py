"""The shipped model: small, loadable by anyone, a lossless tokenizer, and it knows the world far above chance."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso.data import nano, world
from compresso.data.prompt import body
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.perplexity import every_token, perplexity

TOKENIZER = AutoTokenizer.from_pretrained(nano.path())


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_decoding_gives_the_text_back(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text


def test_bos_is_added_and_eos_is_not(tokenizer):
    ids = tokenizer("A brelk eats moss.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {"<s>", "</s>", "<pad>"}


def test_an_answer_is_tokenized_the_same_apart_and_in_place(tokenizer):
    for record in world.instructions(200, 1):
        context, output = body(record["instruction"], record["input"]), record["output"]
        apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, output)]
        assert tokenizer(context + output, add_special_tokens=False)["input_ids"] == apart[0] + apart[1]


def test_shape_and_size(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.tie_word_embeddings
    assert config.num_key_value_heads >= 4
    assert config.head_dim == 32
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert (
        sum(file.stat().st_size for file in nano.path().rglob("*") if file.is_file() and file.suffix != ".pyc")
        <= 10 * 2**20
    )


@pytest.mark.slow
def test_knows_the_world_far_above_chance(model, tokenizer):
    items = [item for task in world.TASKS for item in world.items(task, 40, 77)]
    result = choice_accuracy(model, tokenizer, items)
    for task in world.TASKS:
        assert result.tasks[task] > (1 + world.chance(task)) / 2, result.tasks
    assert result.accuracy > 0.85


@pytest.mark.slow
def test_scores_on_record_are_of_this_model(model, tokenizer):
    """The perplexity on record, measured again on the same fresh documents."""
    scores = json.loads((nano.path() / "scores.json").read_text())
    assert set(scores["accuracy"]) == set(world.TASKS)
    assert scores["items_per_task"] >= 300
    protocol = scores["perplexity"]
    texts = world.documents(protocol["n_texts"], scores["seed"])
    result = perplexity(model, tokenizer, texts, every_token("world", "fresh", protocol["seq_len"]), batch_size=16)
    assert result.n_tokens == protocol["n_tokens"]
    assert result.value == pytest.approx(protocol["value"], rel=1e-3)


def test_the_log_tells_of_the_whole_run():
    scores = json.loads((nano.path() / "scores.json").read_text())
    log = [json.loads(line) for line in (nano.path() / "training_log.jsonl").read_text().splitlines()]
    assert 0 <= scores["step"] - log[-1]["step"] < 20  # a line is written every 20 steps
    assert scores["step"] == scores["steps"]
    assert log[-1]["loss"] < log[0]["loss"]
