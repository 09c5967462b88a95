"""Written text: what counts as broken, on sequences made by hand; greedy decoding against a plain forward and
transformers' own.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compresso.data import nano
from compresso.errors import DataError, NumericError
from compresso.metrics.generation import (
    broken,
    ends_in_loop,
    generation_measurements,
    greedy,
    repetition,
    samples,
    world_prompts,
)
from compresso.metrics.prompts import OPENINGS, REQUESTS
from compresso.metrics.record import Environment, Sample

TOKENIZER = AutoTokenizer.from_pretrained(nano.path())
HERE = Environment.here(dtype=torch.float32)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = {
        "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    config = LlamaConfig(**sizes, **ids, vocab_size=len(TOKENIZER), max_position_embeddings=128, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 1, 1, 1], 0),  # a single 4-gram has no earlier one
        ([1, 1, 1, 1, 1], 1 / 2),
        (list(range(20)), 0),
        ([1, 2, 3, 4] * 5, 13 / 17),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
        ([*range(10), *range(10)], 7 / 17),
    ],
)
def test_repetition_is_the_share_of_runs_that_were_there_before(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 16, True),
        ([7] * 15, False),  # too short to be sure
        ([*range(40), *[7] * 16], True),
        ([*[7] * 16, 8], False),  # it got out of it
        ([*range(10), *[1, 2, 3] * 6], True),
        ([*range(10), *[1, 2, 3] * 5, 1], True),  # cut off within a turn
        ([*range(10), *[1, 2, 3] * 5], False),  # 15 tokens
        ([*range(50, 60), *list(range(16)) * 3], True),
        ([*range(50, 60), *list(range(16)) * 2], False),  # two turns are no loop
        (list(range(17)) * 4, False),  # longer turns are left to repetition
        (list(range(64)), False),
        ([], False),
    ],
)
def test_a_loop_is_one_cycle_to_the_end(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) is loops


@pytest.mark.parametrize(
    ("text", "tokens", "ended", "expected"),
    [
        ("", [], True, True),
        (" \n", [5, 6], True, True),
        ("West.", [9], True, False),  # short, and over
        ("A fine text.", list(range(30)), False, False),
        ("the the the", [*range(40), *[7] * 20], False, True),  # too little of it for the share
        ("the the the", [*range(40), *[7] * 20], True, False),  # the same, but it found an end
        ("again and again", list(range(17)) * 4, True, True),
        ("half", [*range(10), *range(10)], False, False),
    ],
)
def test_what_counts_as_broken(text: str, tokens: list[int], ended: bool, expected: bool) -> None:
    assert broken(text, tokens, ended) is expected


def test_greedy_is_the_most_likely_token_each_time(model: LlamaForCausalLM) -> None:
    made = samples(model, TOKENIZER, OPENINGS[:3], max_new_tokens=12)
    assert [one.prompt for one in made] == list(OPENINGS[:3])
    for one in made:
        ids = [TOKENIZER.bos_token_id, *TOKENIZER.encode(one.prompt, add_special_tokens=False)]
        start = len(ids)
        while len(ids) < start + 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            ids.append(token)
        new = ids[start:]
        assert (one.text, one.tokens) == (TOKENIZER.decode(new, skip_special_tokens=True), len(new))
        assert one.repetition == repetition(new)
        assert one.degenerate is broken(one.text, new, len(new) < 12)


def test_the_embedded_model_writes_as_transformers_lets_it() -> None:
    trained = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    prompts = world_prompts(4, seed=3)
    made = samples(trained, TOKENIZER, prompts, max_new_tokens=48)
    for one in made:
        given = TOKENIZER(one.prompt, return_tensors="pt")
        ids = trained.generate(**given, do_sample=False, max_new_tokens=48)[0, given["input_ids"].shape[1] :]
        assert one.text == TOKENIZER.decode(ids, skip_special_tokens=True)
        sentences = one.text.replace(". ", ".. ").split(". ")
        assert one.degenerate is (
            max(map(sentences.count, sentences)) >= 3
        )  # even this one says some things three times
    assert {one.degenerate for one in made} == {True, False}


def test_an_end_token_at_once_is_an_empty_text(model: LlamaForCausalLM) -> None:
    first = samples(model, TOKENIZER, OPENINGS[:1], max_new_tokens=1)[0]
    (token,) = TOKENIZER.encode(first.text, add_special_tokens=False)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [before, token]
    try:
        (made,) = samples(model, TOKENIZER, OPENINGS[:1])
    finally:
        model.generation_config.eos_token_id = before
    assert (made.text, made.tokens, made.repetition, made.degenerate) == ("", 0, 0.0, True)


def test_a_model_that_says_one_thing_is_degenerate(model: LlamaForCausalLM) -> None:
    stuck = LlamaForCausalLM(model.config)
    with torch.no_grad():
        stuck.lm_head.weight.zero_()
    stuck.generation_config.eos_token_id = TOKENIZER.eos_token_id
    made = samples(
        stuck, TOKENIZER, encode=lambda text: [3, *TOKENIZER.encode(text, add_special_tokens=False)], max_new_tokens=20
    )
    assert all(one.degenerate for one in made)  # token 0, the lowest of equals, which is BOS and no text
    assert [one.repetition for one in made] == [pytest.approx(16 / 17)] * len(OPENINGS)
    rate, share = generation_measurements(made, HERE, max_new_tokens=20)
    assert (rate.value, rate.stderr, share.value, share.stderr) == (pytest.approx(16 / 17), pytest.approx(0), 1.0, 0.0)


def test_prompts_are_encoded_as_asked(model: LlamaForCausalLM) -> None:
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return TOKENIZER.encode("A cat", add_special_tokens=False)

    made = samples(model, TOKENIZER, ("one", "two"), max_new_tokens=6, encode=encode)
    assert seen == ["one", "two"] and made[0].text == made[1].text


def test_the_prompts_are_fixed_and_different() -> None:
    assert len(set(OPENINGS)) == len(OPENINGS) == len(set(REQUESTS)) == len(REQUESTS) == 24
    assert world_prompts(5, 1) == world_prompts(5, 1) != world_prompts(5, 2)
    assert all(len(one.split()) == 4 for one in world_prompts(20))


def test_measurements_of_samples() -> None:
    made = [Sample(prompt=f"p{i}", text="t", tokens=9, repetition=i / 4, degenerate=i == 3) for i in range(4)]
    rate, share = generation_measurements(made, HERE, max_new_tokens=9, prompt_format="instruction")
    assert (rate.name, rate.unit, rate.value, rate.n) == ("repetition", "share", pytest.approx(0.375), 4)
    assert rate.stderr == pytest.approx(torch.tensor([0, 0.25, 0.5, 0.75]).std().item() / 2)
    assert (share.name, share.unit, share.value) == ("degenerate", "share", 0.25)
    assert share.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert {"max_new_tokens": 9, "prompt_format": "instruction", "prompts": 4}.items() <= share.protocol.items()
    assert not rate.same_protocol(
        generation_measurements(made[:3], HERE, max_new_tokens=9, prompt_format="instruction")[0]
    )


def test_the_mode_of_the_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    for mode in (True, False):
        model.train(mode)
        samples(model, TOKENIZER, OPENINGS[:1], max_new_tokens=2)
        assert model.training is mode


def test_bad_input_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="0 prompts"):
        samples(model, TOKENIZER, ())
    with pytest.raises(DataError, match="max_new_tokens=0"):
        samples(model, TOKENIZER, max_new_tokens=0)
    with pytest.raises(DataError, match="has no tokens"):
        samples(model, TOKENIZER, ("",), encode=lambda _: [])
    with pytest.raises(DataError, match=r"120 new ones are beyond the model's context of 128"):
        samples(model, TOKENIZER, max_new_tokens=120)
    with pytest.raises(DataError, match="no samples"):
        generation_measurements([], HERE, max_new_tokens=4)
    broken_model = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericError, match="NaN after 0 new tokens"):
        samples(broken_model, TOKENIZER)


@pytest.mark.parametrize("share", [False, True])
def test_prompts_of_unequal_room_stay_within_the_context_of_learned_positions(share: bool) -> None:
    """A row that has filled its room waits for the others; each text is what the row alone gives."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
    prompts = [[5] * 20, [5] * 20 + list(range(10))]
    rooms = [64 - len(ids) for ids in prompts]
    found = greedy(model, prompts, max(rooms), set(), share=share, rooms=rooms)
    assert [len(text) for text, _ in found] == rooms
    alone = [greedy(model, [ids], room, set())[0] for ids, room in zip(prompts, rooms, strict=True)]
    assert found == alone
