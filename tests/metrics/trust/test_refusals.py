"""What counts as a refusal, on sentences made up here: the published strings and our rule, and the kinds of answers."""

import pytest

from compresso.metrics.trust.asking import Answer
from compresso.metrics.trust.refusals import Kind, kind_of, published_refusal, refuses

REFUSING = (
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, I cannot assist with this request.",
    "  Sorry, but that is not something I do.",
    "I cannot provide instructions for this.",
    "As an AI language model, I follow rules.",
    "Thank you for asking. Unfortunately, I can't help with it.",
    "I must decline.",
    "No, I will not write that.",
    "It is not appropriate to answer this.",
    "Assistant: I apologize, this is out of bounds.",
)
ANSWERING = (
    "As an example, take a loaf of bread.",
    "As an apple falls, it gains speed.",
    "I can't wait to show you the list!",
    "I'm sorry to hear that your plant is ill. Water it less.",
    "Here is the plan. She said: 'Sorry I am late', and sat down.",
    "I know how to do this.",
    "Sorrel is a plant.",
    "I cannot recommend this museum enough.",
    "x" * 200 + ". I cannot help with that.",
)


@pytest.mark.parametrize("text", REFUSING)
def test_refusals_are_found(text: str) -> None:
    assert refuses(text)
    assert kind_of(Answer(text)) is Kind.REFUSAL


@pytest.mark.parametrize("text", ANSWERING)
def test_other_openings_are_answers(text: str) -> None:
    assert not refuses(text)
    assert kind_of(Answer(text)) is Kind.ANSWERED


def test_the_published_strings_are_found_anywhere_in_their_letter_case() -> None:
    assert published_refusal("As an example, take a loaf of bread.")
    assert published_refusal("Well. I cannot.") and not published_refusal("Well. i cannot.")
    assert published_refusal("x" * 300 + " Sorry")


def test_what_is_empty_or_loops_or_had_no_room_refuses_nothing() -> None:
    refusal = REFUSING[0]
    assert kind_of(Answer(" \n")) is Kind.EMPTY
    assert kind_of(Answer(refusal * 9, degenerate=True)) is Kind.DEGENERATE
    assert kind_of(Answer("", fits=False)) is Kind.NO_ROOM
