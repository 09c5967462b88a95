"""Tasks are found by name, and a name that is none names the nearest."""

import re
from typing import get_args

import pytest

from compresso.cli.options import Task
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.tasks.base import DEFAULT, task_named, tasks


def test_tasks_are_found_by_their_names() -> None:
    assert {"causal-lm", "classification"} <= set(tasks())
    assert all(task_named(name).name == name for name in tasks())
    assert Job.__dataclass_fields__["task"].default is task_named(DEFAULT)


def test_the_help_of_the_option_names_all() -> None:
    told = get_args(Task)[1].help
    assert all(re.search(rf"[ :]{name}[,; ]", told) for name in tasks())


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="task 'clasification' is unknown; did you mean 'classification'"):
        task_named("clasification")
    for name in ("clasification", "sentiment", "q"):
        with pytest.raises(RecipeError, match=f"nown: {', '.join(tasks())}$"):
            task_named(name)
