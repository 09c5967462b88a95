"""Of a teacher that was kept whole a student learns what it learns of a live one."""

from typing import Any

import pytest
import torch
from tests.training.test_distill_objective import MICRO, batch, llama, objective
from torch import Tensor

from compresso.core.buckets import strongest
from compresso.training.cached_objective import LOG_PROBS, OUTCOMES, CachedObjective
from compresso.training.halves import Network, next_tokens


def kept(given: dict[str, Tensor], n: int, tokens: Any = "labelled", temperature: float = 1.0) -> dict[str, Tensor]:
    """The batch with what the teacher says of its places."""
    at = next_tokens(given, tokens)
    with torch.no_grad():
        logits = llama(1)(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[at.places]
    outcomes, log_probs = strongest(logits, n, temperature)
    return {**given, OUTCOMES: outcomes.int(), LOG_PROBS: log_probs}


def learned(one: torch.nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logged numbers and gradients."""
    one.zero_grad()
    numbers = one(given, MICRO)
    numbers["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in one.named_parameters() if parameter.grad is not None}
    return {name: number.detach() for name, number in numbers.items()}, found


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"divergence": "reverse", "tokens": "all", "temperature": 2.0},
        {"divergence": "js", "beta": 0.3, "hard_weight": 0.5, "temperature": 0.5},
    ],
)
def test_all_of_the_vocabulary_is_the_live_loss_and_its_gradient(knobs: dict[str, Any]) -> None:
    student, given = llama(0), batch(padding=2)
    taught = kept(given, 20, knobs.get("tokens", "labelled"), knobs.get("temperature", 1.0))
    numbers, gradients = learned(CachedObjective(student, Network(student), chunk=5, **knobs), taught)
    live_numbers, live = learned(objective(student, llama(1), chunk=5, **knobs), given)
    torch.testing.assert_close(numbers, live_numbers)
    assert gradients.keys() == live.keys()
    for name in live:
        torch.testing.assert_close(gradients[name], live[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tokens", ["labelled", "all"])
def test_padding_and_pieces_change_nothing_and_less_is_a_lower_bound(tokens: Any) -> None:
    student = llama(0)
    wide, narrow = (kept(batch(padding=padding), 4, tokens) for padding in (5, 0))
    whole, pieces = (CachedObjective(student, Network(student), tokens=tokens, chunk=chunk) for chunk in (99, 2))
    one, other = learned(whole, narrow), learned(pieces, wide)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    live = learned(objective(student, llama(1), tokens=tokens), batch())[0]
    assert 0 < float(one[0]["loss"]) < float(live["loss"])


def test_logits_exist_for_a_piece_of_the_tokens_at_a_time() -> None:
    student, seen = llama(0), list[int]()
    one = CachedObjective(student, Network(student), tokens="all", chunk=4)
    student.lm_head.register_forward_hook(lambda head, given, logits: seen.append(logits.shape[:-1].numel()))
    one(kept(batch(), 4, "all"), MICRO)["loss"].backward()
    assert seen == [4, 4, 4, 4, 4, 1]


def test_answers_to_another_question_are_refused() -> None:
    student = llama(0)
    one = CachedObjective(student, Network(student), tokens="all")
    with pytest.raises(ValueError, match="asked for 12 places of a batch of which 21 count"):
        one(kept(batch(), 4, "labelled"), MICRO)
    one = CachedObjective(student, Network(student), tokens="all", hard_weight=1.0)
    given = {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
    with pytest.raises(ValueError, match="nothing to weigh"):
        one(kept(given, 4, "all"), MICRO)
