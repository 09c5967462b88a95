"""Tokens as units: rows leave the embedding and the head, ids follow everywhere, and what is left computes what it
computed.

The oracle is the dense model itself: without its removed tokens' logits it must be the smaller one, alone and beside
other removals.
"""

import pytest
import torch
from tests.arch.conftest import WITH_HIDDEN
from tests.arch.test_laws import IDS, TOGETHER, Tiny, described, logits, random_masks, shrunk, tokens_left

from compresso.arch.vocabulary import vocabulary_axis
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_tokens_leave_together_with_everything_else(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch, axes = described(model)
    masks = random_masks(axes, TOGETHER) | random_masks(axes, Kind.VOCAB)
    with gated(model, axes, masks):
        expected = logits(model)
    kept, ids = tokens_left(masks)
    assert isinstance(kept, torch.Tensor)
    predicted = CostModel(axes, arch.weights(model)).of(Plan.from_masks(axes, masks)).parameters()["total"]
    shrunk(model, axes, masks)
    assert (logits(model, ids) - expected[..., kept]).abs().max() < 1e-5
    assert predicted == sum(parameter.numel() for parameter in model.parameters())
    assert vocabulary_axis(model).size == model.config.vocab_size == len(kept)
    assert arch.axes(model)[-1].size == len(kept)


def test_cutting_twice_is_cutting_once(tiny: Tiny) -> None:
    twice, once = tiny("llama_gqa"), tiny("llama_gqa")
    first, second = Plan({"vocab": (0, 1, 5, 7, 9, 100)}), Plan({"vocab": (0, 2, 5)})
    for plan in (first, second):
        shrink_(twice, described(twice)[1], plan)
    shrink_(once, described(once)[1], first.then(second))
    assert first.then(second).kept["vocab"] == (0, 5, 100)
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))


def test_ids_follow_in_configs_and_modules(tiny: Tiny) -> None:
    model = tiny("qwen3")
    model.config.eos_token_id = model.generation_config.eos_token_id = [9, 7, 8]
    model.generation_config.suppress_tokens, model.generation_config.bad_words_ids = [3, 9], [[9, 7], [3, 7]]
    model.config.pad_token_id = 40
    model.model.embed_tokens.padding_idx = model.model.padding_idx = 40
    shrink_(model, described(model)[1], Plan({"vocab": (0, 1, 7, 9, 40)}))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [3, 2], 4)
    assert model.generation_config.eos_token_id == [3, 2], "the end tokens that are left, in their order"
    assert (model.generation_config.suppress_tokens, model.generation_config.bad_words_ids) == ([3], [[3, 2]])
    assert model.model.embed_tokens.padding_idx == model.model.padding_idx == 4
    assert model.vocab_size == model.config.vocab_size == model.lm_head.out_features == 5
    loss = model(input_ids=torch.tensor([[0, 4, 2]]), labels=torch.tensor([[0, 1, 2]])).loss
    assert loss.isfinite()


def test_half_a_token_is_refused(tiny: Tiny) -> None:
    model = tiny("mistral")
    with pytest.raises(ArchError, match="keeps tokens by halves"):
        shrink_(model, described(model)[1], Plan(), {"vocab": torch.full((128,), 0.5)})
    with pytest.raises(ArchError, match="at least 1 must be kept"):
        shrink_(model, described(model)[1], Plan({"vocab": ()}))
    assert model.lm_head.weight.shape[0] == 128 and IDS.max() < 128
