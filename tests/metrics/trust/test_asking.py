"""A real model asked: weights against transformers' own loss, greedy texts against its own generate, and draws that
depend on nothing but their seed.
"""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso.data import nano
from compresso.data.instructions import encode_conversation, encode_prompt
from compresso.data.records import Message
from compresso.errors import DataError
from compresso.metrics.trust.asking import Limits, ModelRespondent, Request

REQUESTS = [Request("a", "Name the day after Monday."), Request("b", "What falls when it rains, and why is it wet?")]


@pytest.fixture(scope="module")
def respondent() -> ModelRespondent:
    model = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    return ModelRespondent(model, AutoTokenizer.from_pretrained(nano.path()), batch=4)


def test_weights_are_sums_of_log_probabilities(respondent: ModelRespondent) -> None:
    """Each choice alone, by the loss that transformers takes of its tokens."""
    model, tokenizer = respondent._model, respondent._tokenizer
    choices = [("yes", "no"), ("the water", "the wall", "a")]
    for request, mine, found in zip(REQUESTS, choices, respondent.weigh(REQUESTS, choices), strict=True):
        before = encode_conversation(tokenizer, request.messages())
        for choice, weight in zip(mine, found or [], strict=True):
            target = tokenizer(choice, add_special_tokens=False)["input_ids"]
            labels = [-100] * len(before) + list(target)
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([before + list(target)]), labels=torch.tensor([labels])).loss
            assert weight == pytest.approx(-float(loss) * len(target), abs=1e-3)


def test_a_request_is_encoded_as_an_instruction_is(respondent: ModelRespondent) -> None:
    tokenizer = respondent._tokenizer
    assert encode_conversation(tokenizer, [Message("user", "Hello.")]) == encode_prompt(
        tokenizer, "Hello.", prompt_on=False
    )


def test_greedy_texts_are_those_of_generate(respondent: ModelRespondent) -> None:
    model, tokenizer = respondent._model, respondent._tokenizer
    for request, answer in zip(REQUESTS, respondent.write(REQUESTS, Limits(12)), strict=True):
        ids = torch.tensor([encode_conversation(tokenizer, request.messages())])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_what_requests_begin_with_is_read_once(respondent: ModelRespondent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers as it does alone; the tokens of the template go through the model once, not once a request."""
    model = respondent._model
    template = "There is a town by the river, with a mill, a school and a market. In this town somebody asks: "
    alike = [Request(f"a{i}", f"{template}{end}") for i, end in enumerate(("Who?", "Where is the mill?", "Why not?"))]
    others = [Request("b", "Name a colour."), REQUESTS[1]]
    alone = [respondent.write([one], Limits(10))[0] for one in (*alike, *others)]
    read: list[int] = []
    forward = model.forward

    @functools.wraps(forward)
    def watched(*given, **named):  # type: ignore[no-untyped-def]
        read.append(named["input_ids"].numel())
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", watched)
    assert respondent.write([alike[0], others[0], alike[1], others[1], alike[2]], Limits(10)) == [
        alone[0], alone[3], alone[1], alone[4], alone[2],
    ]  # fmt: skip
    prompts = [encode_conversation(respondent._tokenizer, one.messages()) for one in alike]
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert shared > 20 and shared in read
    longest = max(len(ids) for ids in prompts) - shared
    assert 3 * longest in read, "the rest of each, side by side"


def test_draws_depend_on_their_seed_alone(respondent: ModelRespondent) -> None:
    drawn = [Request(f"d{seed}", "Zq 7 ?? blue wug kk.", seed=seed) for seed in range(6)]
    together = respondent.write([*drawn, REQUESTS[0]], Limits(8))
    assert together[2] == respondent.write(drawn[2:3], Limits(8))[0]
    assert together[6] == respondent.write(REQUESTS[:1], Limits(8))[0]
    assert len({one.text for one in together[:6]}) > 1


def test_what_does_not_fit_is_said_and_not_asked(respondent: ModelRespondent) -> None:
    long = Request("long", "word " * 3000)
    assert respondent.weigh([long, REQUESTS[0]], [("a", "b")] * 2)[0] is None
    answers = respondent.write([long, REQUESTS[0]], Limits(4))
    assert not answers[0].fits and answers[1].fits
    ids = len(encode_conversation(respondent._tokenizer, REQUESTS[0].messages()))
    assert not respondent.write(REQUESTS[:1], Limits(4, whole=ids))[0].fits
    short = respondent.write(REQUESTS[:1], Limits(9, whole=ids + 2))[0]
    assert short.fits and len(respondent._tokenizer(short.text)["input_ids"]) <= 3


def test_a_choice_without_text_is_refused(respondent: ModelRespondent) -> None:
    with pytest.raises(DataError, match="request a: a choice of"):
        respondent.weigh(REQUESTS[:1], [("yes", "")])
