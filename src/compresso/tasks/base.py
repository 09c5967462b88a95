"""What a run trains and judges by, as one value: collation, loss and where two models are compared; and how one is
found by its name.

A task is described once, in a file of its own beside this one; objectives and stages take what they need of it as an
argument. Files of this package are found by walking it, so a new file is a new task. One that cannot be imported is an
error.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.loss import Loss
from compresso.data.batches import Row
from compresso.errors import RecipeError, nearest
from compresso.training.distill_objective import Compare, Halves

DEFAULT = "causal-lm"
"""The task of a recipe that names none."""


class Task(Protocol):
    """One task."""

    @property
    def name(self) -> str:
        """What recipes and `--task` call it."""
        ...

    @property
    def loss(self) -> Loss:
        """What training minimises."""
        ...

    @property
    def compare(self) -> Compare:
        """Where distillation compares two models on a batch."""
        ...

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Halves:
        """A model, and blocks whose outputs are wanted, as distillation reads it."""
        ...

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """Examples side by side: what the model reads, and "labels"."""
        ...


_KNOWN: dict[str, Task] = {}


def register(task: Task) -> None:
    """Add a task; one of the same name is replaced."""
    _KNOWN[task.name] = task


def tasks() -> Mapping[str, Task]:
    """All tasks by name, sorted."""
    import compresso.tasks as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_KNOWN.items()))


def task_named(name: str) -> Task:
    """A task by its name. Raises RecipeError naming the nearest."""
    known = tasks()
    if name not in known:
        raise RecipeError(f"task '{name}' is unknown; {nearest(name, known)}")
    return known[name]
