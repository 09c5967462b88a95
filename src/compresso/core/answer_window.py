"""A part of a text in which a question is answered, as far as its tokens know of the text."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 30
"""Tokens of an answer at most, as in BERT's code."""


@dataclass(frozen=True, slots=True)
class AnswerWindow:
    """What an answer is read from.

    Args:
        question: the same number for all windows of one question, and for none else.
        group: what examples share that must not lie on both sides of a split; the title.
        context: the whole text.
        answers: those that people gave; none of a question that the text does not answer.
        begins, ends: of each token, where it begins and ends in the context; -1 for a token of the question and for
            special ones.
        open: whether the answer may be that there is none, which the first token stands for.
    """

    question: int
    group: str
    context: str
    answers: tuple[str, ...]
    begins: "array[int]"
    ends: "array[int]"
    open: bool = False

    def best(self, starts: Tensor, ends: Tensor) -> tuple[float, str]:
        """The likeliest answer of `LONGEST` tokens at most, and the sum of its two logits.

        Args:
            starts, ends: logits of each token [tokens].
        """
        inside = torch.tensor([begin >= 0 for begin in self.begins])
        first, last = (one.masked_fill(~inside, -torch.inf) for one in (starts, ends))
        top, where = -torch.inf, (0, 0)
        for length in range(min(LONGEST, len(inside))):
            both = first[: len(first) - length] + last[length:]
            place = int(both.argmax())
            if float(both[place]) > top:
                top, where = float(both[place]), (place, place + length)
        if top == -torch.inf:
            return top, ""
        return top, self.context[self.begins[where[0]] : self.ends[where[1]]]

    def none(self, starts: Tensor, ends: Tensor) -> float:
        """The sum of the two logits of there being no answer; arguments as of `best`."""
        return float(starts[0] + ends[0])
