"""A small invented world for training and measuring small models, in three views: text, instructions and
multiple-choice items.

    documents     plain text, in which every fact of the world occurs
    instructions  Alpaca-style records, from the training split only
    items         multiple-choice questions, from the held-out split only

Both splits share the facts and the wordings, but no combination (creature and attribute, object and action, set of
numbers...) is in both. Everything follows from the seed alone, on any machine.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from compresso.data.world.knowledge import KNOWLEDGE
from compresso.data.world.question import Question, Task, held_out
from compresso.data.world.symbols import SYMBOLS
from compresso.data.world.text import document
from compresso.errors import DataError, nearest

_TASKS: dict[str, Task] = {task.name: task for task in (*KNOWLEDGE, *SYMBOLS)}
TASKS: tuple[str, ...] = tuple(_TASKS)
_IDLE = 3000  # draws without a new item after which a task is held to be exhausted


@dataclass(frozen=True)
class Item:
    """A multiple-choice question; `answer` is the place of the right one in `choices`."""

    task: str
    instruction: str
    input: str
    choices: tuple[str, ...]
    answer: int


def chance(task: str) -> float:
    """The accuracy of a guess: one over the number of choices, which is fixed for a task."""
    return 1 / _task(task).n_choices


def documents(n: int, seed: int) -> Iterator[str]:
    """`n` short texts about the world."""
    rng = random.Random(seed)
    for _ in range(n):
        yield document(rng)


def instructions(n: int, seed: int) -> Iterator[dict[str, str]]:
    """`n` records {instruction, input, output} of the training split, all tasks equally often."""
    rng = random.Random(seed)
    for _ in range(n):
        task = _TASKS[rng.choice(TASKS)]
        question = _draw(task, rng, held=False)
        yield {"instruction": question.instruction, "input": question.input, "output": question.answer}


def items(task: str, n: int, seed: int) -> list[Item]:
    """`n` different items of one task from the held-out split, the right answer at every place equally often.

    Raises:
        DataError: an unknown task, or more items than the held-out split has wordings.
    """
    kind = _task(task)
    rng = random.Random(seed)
    places = [i % kind.n_choices for i in range(n)]
    rng.shuffle(places)
    made: list[Item] = []
    seen: set[tuple[str, str]] = set()
    idle = 0
    while len(made) < n:
        question = _draw(kind, rng, held=True)
        if (question.instruction, question.input) in seen:
            idle += 1
            if idle == _IDLE:
                raise DataError(
                    f"task '{task}' has only about {len(made)} different held-out items, {n} were asked for. Ask for"
                    " fewer."
                )
            continue
        idle = 0
        seen.add((question.instruction, question.input))
        choices = list(question.wrong[: kind.n_choices - 1])
        choices.insert(places[len(made)], question.answer)
        made.append(Item(task, question.instruction, question.input, tuple(choices), places[len(made)]))
    return made


def _task(name: str) -> Task:
    if name not in _TASKS:
        raise DataError(f"no task '{name}' in the world; {nearest(name, TASKS)}")
    return _TASKS[name]


def _draw(task: Task, rng: random.Random, held: bool) -> Question:
    while True:
        question = task.draw(rng)
        if held_out(task.name, question.key) == held:
            return question


__all__ = ["TASKS", "Item", "chance", "documents", "instructions", "items"]
