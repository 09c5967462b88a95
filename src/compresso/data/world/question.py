"""A question about the world with its right and wrong answers, and the split that keeps some combinations out of
training.

The split is a hash of what is asked about (the creature and the attribute, the object and the action, the set of
numbers), not of the sentence: a combination that is held out is held out in every wording.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_PERCENT = 25


@dataclass(frozen=True)
class Question:
    """What is asked, the answer, at least as many wrong answers as the task shows, and the `key` by which the split is
    made.
    """

    instruction: str
    input: str
    answer: str
    wrong: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Task:
    """A kind of question: `draw` makes one at random from all combinations, held out or not."""

    name: str
    n_choices: int
    draw: Callable[[random.Random], Question]


def held_out(task: str, key: str) -> bool:
    """Whether this combination is kept out of the training instructions; the same on every machine."""
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT
