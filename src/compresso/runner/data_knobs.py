"""What a recipe says of its data, and which of that a task reads: what is asked for and read by nobody is refused.

What a task reads is `Task.data_settings`, and `source` and `held`, which every run with data reads. A setting that is
off, or as it is in a recipe that says nothing, asks for nothing: recipes that were written out in full stay valid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass

from compresso.errors import RecipeError
from compresso.runner.recipe_file import short
from compresso.tasks.base import Task

_OF_EVERY_RUN = ("source", "held")


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataKnobs:
    """What a recipe says of its data.

    Args:
        source: used when the command line gives none; null means that data must be given.
        max_length: tokens an example is truncated to, prompt included.
        prompt: whether the collaborative prompt stands before each instruction.
        pack: whether plain text is cut into full windows instead of one document a row.
        limit: examples read at most.
        held: examples kept out of training for the before/after loss.
        train_on_inputs: whether the loss of conversations falls on what was asked, too, and not on responses alone.
    """

    source: str | None = None
    max_length: Annotated[int, Ge(2)] = 512
    prompt: bool = True
    pack: bool = True
    limit: Annotated[int, Ge(1)] | None = None
    held: Annotated[int, Ge(0)] = 32
    train_on_inputs: bool = False


_USUAL: Mapping[str, Any] = {one.name: one.default for one in dataclasses.fields(DataKnobs)}  # type: ignore[arg-type]


def reads(task: Task, name: str) -> bool:
    """Whether a task reads a setting of the data; what is none is not decided here, and counts as read."""
    return name not in _USUAL or name in (*_OF_EVERY_RUN, *task.data_settings)


def told(data: DataKnobs, task: Task) -> dict[str, Any]:
    """The settings that a task reads, by name."""
    return {name: getattr(data, name) for name in _USUAL if reads(task, name)}


def refuse_set(task: Task, name: str, value: Any, asked: str) -> None:
    """Refuse a setting that was given by name, under a task that does not read it.

    Args:
        task: of the run.
        name: such as "prompt".
        value: given; one that is off asks for nothing.
        asked: it in the words in which it was given.

    Raises RecipeError.
    """
    if value and not reads(task, name):
        raise RecipeError(f"{asked}: {_unread(task, name)}")


def refuse_unread(task: Task, data: DataKnobs, given: Mapping[str, Any], where: str) -> None:
    """Refuse settings of a recipe that ask for something, under a task that does not read them.

    Args:
        task: of the recipe.
        data: checked.
        given: as it was written.
        where: begins the message.

    Raises RecipeError naming the first.
    """
    for name in given:
        value = getattr(data, name)
        if value != _USUAL[name]:
            refuse_set(task, name, value, f"{where}: {name}={short(value)}")


def _unread(task: Task, name: str) -> str:
    """That a task does not read a setting, what it reads instead, and the cure."""
    known = [f"data.{one}" for one in _USUAL if reads(task, one)]
    return (
        f"task {task.name} does not read data.{name}; it reads {', '.join(known[:-1])} and {known[-1]}. Leave"
        f" data.{name} out"
    )
