"""What a run trains and judges by, as one value: data, head, loss, comparison, metric and guard; and how one is found
by its name.

A task is described once, in a file of its own beside this one; objectives, stages, preflight, final evaluation and
report take what they need of it as an argument. Files of this package are found by walking it, so a new file is a new
task. One that cannot be imported is an error.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.loss import Loss
from compresso.core.picture import PixelInput
from compresso.core.row import Row
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded, Reach
from compresso.errors import RecipeError, nearest
from compresso.metrics.guard import Guard
from compresso.metrics.record import Environment, Measurement
from compresso.training.halves import Compare, Halves

DEFAULT = "causal-lm"
"""The task of a recipe that names none."""


@dataclass(frozen=True)
class Reading:
    """How records become rows.

    Args:
        max_length: most tokens of a row.
        prompt: whether the collaborative prompt stands before instructions.
        pack: whether plain text is cut into full windows.
        limit: records looked at, at most.
        skip_bad: whether records are left out, counted, that a chat template refuses or whose pictures cannot be read;
            None where nobody can choose.
        context: tokens that the model reads at most, where that is known.
        on_inputs: whether what was asked is learned, too.
        pixels: how the model sees pictures; None where it reads text.
        learns: whether a model is trained on them; else one that was is scored.
    """

    max_length: int
    prompt: bool = False
    pack: bool = False
    limit: int | None = None
    skip_bad: bool | None = False
    context: int | None = None
    on_inputs: bool = False
    pixels: PixelInput | None = None
    learns: bool = True

    def reach(self) -> Reach:
        """How long an example may be."""
        return Reach(self.max_length, self.context, self.prompt)


class Score(Protocol):
    """What a model was found to do on held-out examples."""

    @property
    def mean(self) -> float:
        """The loss in nats, over all labels."""
        ...

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """The task's metric; with `noise` also how far it differs between halves of the examples, if that is known."""
        ...


class Task(Protocol):
    """One task."""

    @property
    def name(self) -> str:
        """What recipes and `--task` call it."""
        ...

    @property
    def auto_class(self) -> str:
        """transformers' class that opens its models."""
        ...

    @property
    def pipeline(self) -> str:
        """The hub's name for it."""
        ...

    @property
    def form(self) -> RecordForm:
        """What a row of data holds."""
        ...

    @property
    def metric(self) -> str:
        """The measurement that models are compared by."""
        ...

    @property
    def head(self) -> str:
        """The head that a base model is given, in words."""
        ...

    @property
    def usage(self) -> str:
        """Python that opens a model and asks it something, with {folder} for the model."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether its examples are texts; else they are pictures, and no tokenizer is wanted."""
        ...

    @property
    def data_settings(self) -> tuple[str, ...]:
        """What of a recipe's settings of data it reads, beside those that every run does."""
        ...

    @property
    def writes_text(self) -> bool:
        """Whether its models write text, which is then read, compared and timed."""
        ...

    @property
    def loss(self) -> Loss:
        """What training minimises."""
        ...

    @property
    def compare(self) -> Compare:
        """Where distillation compares two models on a batch."""
        ...

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it, and the cure; "" if one can."""
        ...

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether such a model has to be given a head first."""
        ...

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The model with a new head for these labels, drawn by the seed; its modules are moved, not copied."""
        ...

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Rows ready for batches, for a model with this config; ready windows need no tokenizer. Raises DataError."""
        ...

    def held_out(self, n_rows: int) -> int:
        """How many of so many examples no stage trains on, where a recipe does not say."""
        ...

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Which examples no stage trains on: about `n`, and what belongs together is on one side. Asked for as many as
        it gave, it gives the same ones.
        """
        ...

    def undivided(self, rows: Sequence[Row]) -> str:
        """Why no examples can be held out without all others, and the cure; "" where some can."""
        ...

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Halves:
        """A model, and blocks whose outputs are wanted, as distillation reads it."""
        ...

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """Examples side by side: what the model reads, and "labels"."""
        ...

    def again(self, row: Row, seed: int) -> Row:
        """An example as one pass over the data sees it, by a seed of that pass; the same where nothing is drawn."""
        ...

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """What a masked model and a smaller one are compared on, where a run has examples."""
        ...

    def score(self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None) -> Score:
        """How a model does on examples.

        Args:
            model: live.
            rows: examples in its tokens.
            counted_as: the same ones in another model's tokens, if the loss is shared out over those.

        Raises DataError, NumericError.
        """
        ...

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """Whether a pruned model is worth writing.

        Args:
            config: of the pruned model.
            dense, pruned: "loss" on held-out examples, "examples", and what was measured, by name; absent if it was
                not.
        """
        ...


def spread(n_rows: int, n: int) -> set[int]:
    """`n` places, evenly spaced.

    >>> sorted(spread(10, 3))
    [0, 3, 6]
    """
    return {i * n_rows // n for i in range(n)} if n_rows else set()


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
    """A task by its name. Raises RecipeError naming the nearest, and all."""
    known = tasks()
    if name not in known:
        said = nearest(name, known)
        every = "" if said.startswith("known") else f" Known: {', '.join(known)}"
        raise RecipeError(f"task '{name}' is unknown; {said}{every}")
    return known[name]
