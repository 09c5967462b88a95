"""Caches that forget by a rule. Laws: a budget that holds all is the dense model, no sample holds more than its budget,
padding changes nothing, and a window is dense attention under a written-out mask.
"""

import copy

import pytest
import torch
from tests.edit.test_context_gates import N, decoded, dense, ids, masked, padding
from transformers import AutoModelForCausalLM, PreTrainedModel

from compresso.edit.context_cache import LIVE, PLACES
from compresso.edit.evict import RULES, SINKS, Eviction, evict_, parse
from compresso.errors import ArgumentError


def forgetful(text: str, name: str = "llama") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(dense(name).config)).eval()
    model.load_state_dict(dense(name).state_dict())
    evict_(model, parse(text))
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_budget_that_holds_all_is_the_dense_model(rule: str, name: str) -> None:
    model = forgetful(f"{rule}:64", name)
    mask = padding("left")
    logits, held = decoded(model, ids(), mask, chunks=(7,))
    real = mask.bool()
    torch.testing.assert_close(logits[real], masked(dense(name), ids(), mask)[real], rtol=0, atol=1e-5)
    assert held.live_fraction() == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunks", [(), (16,), (5, 11)])
def test_no_sample_holds_more_than_its_budget_and_padding_changes_nothing(rule: str, chunks: tuple[int, ...]) -> None:
    if rule == "snapkv":
        chunks = (N,)  # decoding drops nothing
    model = forgetful(f"{rule}:0.5")
    logits, held = decoded(model, ids(), padding("right"), chunks)
    for layer in held.layers:
        assert (layer.live_tokens() <= torch.tensor([12, 9, 5]).view(3, 1)).all()
        assert (layer.live_tokens() >= 4).all()
    alone, _ = decoded(model, ids()[:1], chunks=chunks)
    torch.testing.assert_close(logits[:1], alone, rtol=0, atol=1e-5)


def test_a_window_with_sinks_is_a_mask() -> None:
    model, budget = forgetful("window:10"), 10
    logits, held = decoded(model, ids())
    n = torch.arange(N)
    late = n.unsqueeze(1) - n < budget - SINKS + 1  # what was held before the token came, and itself
    seen = (n <= n.unsqueeze(1)) & ((n < SINKS) | late)
    plain = dense("llama")(ids(), attention_mask=seen.view(1, 1, N, N).expand(3, 1, N, N)).logits
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
    slots = held.layers[0].slots
    assert sorted(slots[PLACES][0, 0][slots[LIVE][0, 0]].tolist()) == [0, 1, 2, 3, *range(N - 6, N)]


def test_heads_choose_for_themselves() -> None:
    _, held = decoded(forgetful("knorm:8"), ids())
    slots = held.layers[0].slots
    chosen = [set(slots[PLACES][0, head][slots[LIVE][0, head]].tolist()) for head in range(2)]
    assert chosen[0] != chosen[1] and all(N - 1 in places and len(places) == 8 for places in chosen)
    norms = masked_keys(held.get_seq_length()).norm(dim=-1)
    for head in range(2):
        # the newest stays whatever its norm is; a token that had to leave once does not come back
        assert norms[head].argmin().item() in chosen[head]


def masked_keys(n: int) -> torch.Tensor:
    _, held = decoded(forgetful("knorm:64"), ids()[:1, :n])
    return held.layers[0].slots["keys"][0, :, :n]


def test_generate_uses_the_cache_and_keeps_it_under_its_bound() -> None:
    model = forgetful("keydiff:8")
    out = model.generate(ids(n=10), max_new_tokens=10, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert all((layer.live_tokens() == 8).all() for layer in out.past_key_values.layers)


@pytest.mark.parametrize("text", ["nearest:0.5", "keydiff", "keydiff:0", "keydiff:1.5", "keydiff:-3", "h2o:all"])
def test_bad_input(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"--cache '{text}': wanted"):
        parse(text)


def test_budgets() -> None:
    real = torch.tensor([1, 9, 10])
    assert Eviction("knorm", 0.25).budget(real).tolist() == [1, 3, 3]
    assert Eviction("knorm", 6).budget(real).tolist() == [6, 6, 6]
