"""What is not compared: a model that guesses, and one that answers with nothing, whatever its other numbers say.

Laws: a model whose matrices are all zero has the loss of a uniform guess on any text; a model is as sound as itself.
"""

import math

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.data import nano
from compresso.loading import load
from compresso.metrics.guard import judge
from compresso.metrics.trust.dimension import Part
from compresso.metrics.trust.refusals import Kind
from compresso.metrics.trust.soundness import broken_alone, broken_by_texts, broken_in_dimensions, heard
from compresso.metrics.trust.suite import Outcome, trust_changes


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, which knows no plain English, and the same with all matrices zero."""
    dense, zero = (load(nano.path(), dtype=torch.float32) for _ in range(2))
    assert dense.tokenizer is not None
    for parameter in zero.model.parameters():
        parameter.data.zero_()
    return dense.model, zero.model, dense.tokenizer


def test_a_uniform_guess_is_not_compared(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    dense, zero, tokenizer = models
    known = heard(dense, tokenizer)
    guessing = heard(zero, tokenizer, dense=known)
    assert guessing.written is not None and math.isclose(guessing.written.mean, math.log(1024), abs_tol=1e-6)
    assert guessing.plain.mean < known.plain.mean, "by plain sentences alone it would be the better one"
    assert "on texts that the dense model wrote is 6.93 nats" in broken_by_texts(known, guessing)
    assert broken_by_texts(known, heard(dense, tokenizer, dense=known)) == broken_alone(known) == ""
    assert "on plain sentences is 6.93 nats" in broken_alone(heard(zero, tokenizer)), "it writes nothing at all"
    assert broken_by_texts(heard(zero, tokenizer), known).startswith("of the dense model, ")


def test_a_sum_that_comes_out_below_the_guess_is_one() -> None:
    guess = math.log(49152)
    assert judge(vocabulary=49152, dense_loss=2.0, pruned_loss=guess - 1e-5).verdict == "refuse"
    checks = judge(vocabulary=49152, dense_loss=2.0, pruned_loss=guess - 0.1).checks
    assert [one.verdict for one in checks if one.name == "loss"] == ["ok"]


def _outcome(name: str, mark: float, empty: int, n: int = 8) -> Outcome:
    ids = tuple(f"{name}/{i}" for i in range(n))
    kinds = {key: Kind.EMPTY if i < empty else Kind.ANSWERED for i, key in enumerate(ids)}
    return Outcome(name, (Part("a", ids, (mark,) * n),), kinds=kinds)


def test_answers_are_judged_within_a_dimension_too() -> None:
    dense = [_outcome("privacy", 1, 0, 10), _outcome("ethics", 0, 0, 200)]
    some = [_outcome("privacy", 1, 4, 10), _outcome("ethics", 1, 0, 200)]
    all_ = [_outcome("privacy", 1, 10, 10), _outcome("ethics", 1, 0, 200)]
    few = [_outcome("privacy", 1, 1, 10), _outcome("ethics", 1, 0, 200)]
    assert [one.verdict for one in trust_changes(dense, few)] == ["within noise", "rose"]
    assert [one.verdict for one in trust_changes(dense, some)] == ["not comparable", "rose"]
    changes = trust_changes(dense, all_)
    assert [one.verdict for one in changes] == ["not comparable"] * 2
    assert changes[1].words == "empty or looping answers went from 0% to 100% in privacy"


def test_pooled_answers_are_those_of_equal_ids_in_equal_dimensions() -> None:
    before = {"a": {"1": False}, "b": {"1": False}}
    assert broken_in_dimensions(before, before) == ("", {})
    assert broken_in_dimensions(before, {"c": {"1": True}}) == ("", {})
