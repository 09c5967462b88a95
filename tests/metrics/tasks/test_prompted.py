"""The scored window against a plain forward of prompt + context + continuation, and what is cut where these are too
long.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tests.metrics.tasks.conftest import NewModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from compresso.data.instructions import opening_ids
from compresso.errors import DataError
from compresso.metrics.tasks.prompted import PromptedLM
from compresso.metrics.tasks.quiet import quiet

PAIRS = (
    ("What is red?", " A door."),
    ("What is red? A lamp is blue.", " Two ropes of the grey door."),
    ("Rain", " is"),
    ("", "Rain is"),
)
Wrapped = Callable[..., PromptedLM]


@pytest.fixture
def wrapped(new_model: NewModel, tokenizer: PreTrainedTokenizerBase) -> Wrapped:
    """wrapped(opening, context=512, batch=8)"""

    def _wrapped(opening: list[int], context: int = 512, batch: int = 8) -> PromptedLM:
        import copy

        with quiet():
            return PromptedLM(new_model(context), copy.deepcopy(tokenizer), opening, batch)

    return _wrapped


def scored(lm: PromptedLM, pairs: tuple[tuple[str, str], ...]) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, n, ("t", n, 1)) for n, pair in enumerate(pairs)]
    return [total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def by_hand(model: LlamaForCausalLM, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        chances = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(chances[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


def split_ids(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both parts without BOS, tokenised as one text."""
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    head = tokenizer.encode(context, add_special_tokens=False) if context else []
    return head, whole[len(head) :]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt_on", [True, False])
def test_likelihoods_are_those_of_prompt_context_and_continuation(
    prompt_on: bool, batch: int, wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase
) -> None:
    opening = opening_ids(tokenizer) if prompt_on else []
    lm = wrapped(opening, batch=batch)
    expected = []
    for pair in PAIRS:
        head, tail = split_ids(tokenizer, *pair)
        expected.append(by_hand(lm.model, (opening or [int(tokenizer.bos_token_id)]) + head, tail))
    torch.testing.assert_close(torch.tensor(scored(lm, PAIRS)), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert not lm.cut


def test_the_prompt_brings_the_only_beginning_token(wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase) -> None:
    opening = opening_ids(tokenizer)
    assert opening[0] == tokenizer.bos_token_id
    lm = wrapped(opening)
    ids, mask = lm.tok_batch_encode(["Rain is", "Rain"])
    for row, shown, text in zip(ids.tolist(), mask.tolist(), ("Rain is", "Rain"), strict=True):
        real = [token for token, seen in zip(row, shown, strict=True) if seen]
        assert real == opening + tokenizer.encode(text, add_special_tokens=False)
        assert shown == sorted(shown)  # padding stands on the left
        assert real.count(tokenizer.bos_token_id) == 1


def test_the_oldest_context_is_cut_and_never_the_prompt(wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase) -> None:
    """As many tokens of the context as fit: those that are read and the one that is only predicted."""
    opening = opening_ids(tokenizer)[:12]
    lm = wrapped(opening, context=32)
    pair = ("one two three four five six seven eight nine ten " * 3, "A door.")
    head, tail = lm._encode_pair(*pair)  # a space before the continuation goes over to it
    head = head[1:]
    room = 32 + 1 - len(opening) - len(tail)
    assert len(head) > room > 2
    assert scored(lm, (pair,))[0] == pytest.approx(by_hand(lm.model, opening + head[-room:], tail), abs=1e-4)
    assert lm.cut == {pair}
    fitting = ("five", " six")
    scored(lm, (fitting,))
    assert lm.cut == {pair}
    ids, _ = lm.tok_batch_encode([pair[0]], left_truncate_len=24)
    assert ids[0].tolist() == opening + tokenizer.encode(pair[0], add_special_tokens=False)[-12:]
    assert pair[0] in lm.cut


def test_without_a_prompt_truncation_is_that_of_the_harness_and_is_counted(wrapped: Wrapped) -> None:
    lm = wrapped([], context=16)
    pair = ("one two three four five six seven eight nine ten " * 3, "A door.")
    head, tail = lm._encode_pair(*pair)
    assert scored(lm, (pair,))[0] == pytest.approx(by_hand(lm.model, (head + tail)[-17 : -len(tail)], tail), abs=1e-4)
    assert lm.cut == {pair}


def generated(lm: PromptedLM, *contexts: str, **settings: Any) -> list[str]:
    settings = {"until": ["@@"], "do_sample": False, "max_gen_toks": 6, **settings}
    requests = [
        Instance("generate_until", {}, (context, settings), n, ("t", n, 1)) for n, context in enumerate(contexts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("prompt_on", [True, False])
def test_generation_continues_prompt_and_context(
    prompt_on: bool, wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase
) -> None:
    opening = opening_ids(tokenizer) if prompt_on else []
    lm = wrapped(opening, batch=2)
    contexts = ("What is red?", "Rain is")
    expected = []
    for context in contexts:
        ids = (opening or [int(tokenizer.bos_token_id)]) + tokenizer.encode(context, add_special_tokens=False)
        first = len(ids)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        expected.append(tokenizer.decode(ids[first:], skip_special_tokens=True))
    with quiet():
        assert generated(lm, *contexts) == expected


def test_what_cannot_fit_is_refused(wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase) -> None:
    opening = opening_ids(tokenizer)
    with pytest.raises(
        DataError, match=rf"prompt has {len(opening)} tokens, the context 64; evaluate with --prompt off"
    ):
        wrapped(opening, context=64)
    lm = wrapped(opening[:40], context=64)
    with pytest.raises(
        DataError, match=r"context of 64 tokens leaves -76 for a question after 100 new ones and the prompt's 40"
    ):
        generated(lm, "Rain", max_gen_toks=100)
    with pytest.raises(
        DataError, match=r"the prompt's 40 tokens and an answer of \d+ tokens do not fit into the model's context of 64"
    ):
        scored(lm, (("Rain", " one two three four" * 30),))
    with pytest.raises(DataError, match=r"leaves 0 for a question after 64 new ones; leave generated tasks"):
        generated(wrapped([], context=64), "Rain", max_gen_toks=64)


def test_a_padding_token_without_a_row_gives_way_to_one_that_has_one(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Contexts of different lengths are padded to generate from; padding is masked, so any token will do."""
    import copy

    model, other = new_model(512), copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert other.pad_token_id >= model.config.vocab_size
    requests = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 3}), n, ("t", n, 1))
        for n, text in enumerate(("What is red?", "Rain"))
    ]
    with quiet():
        lm = PromptedLM(model, other, (), 2)
        assert lm.tokenizer.pad_token_id < model.config.vocab_size
        assert len(lm.generate_until(requests, disable_tqdm=True)) == 2
    strange = copy.deepcopy(tokenizer)
    strange.add_tokens(["Zqxj"])
    with quiet(), pytest.raises(DataError, match="is beyond the model's vocabulary"):
        scored(PromptedLM(model, strange, (), 2), (("Zqxj is red?", " A door."),))
