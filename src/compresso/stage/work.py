"""What a stage costs: the passes that it runs models through, and what it trains. Estimates of time and memory are made
of them before weights are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from compresso.core.axis import Kind
from compresso.stage.knobs import Trains, TunesLora


@dataclass(frozen=True)
class Foreign:
    """A model that is no form of the run's own: its parameters, and its multiply-accumulates of a whole example."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Passes:
    """Passes that a stage runs its model through.

    Args:
        what: they are for, in a word: "calibration", "search", "training", "teacher".
        examples: that pass, those of later updates counted anew; at most, since data may hold fewer. None where the
            length of the data decides.
        forwards, backwards: of the whole model, on each of them.
        weights: whether the backward passes take gradients of weights, which cost as much again as those of
            activations.
        dense: whether it is the dense model that runs, not the stage's own.
        other: another model that runs in the place of both; None for none.
    """

    what: str
    examples: int | None
    forwards: float = 1
    backwards: float = 0
    weights: bool = False
    dense: bool = False
    other: Foreign | None = None


@dataclass(frozen=True)
class Learning:
    """What a stage trains.

    Args:
        trains: how.
        phases: durations in the order of training.
        lora: the adapters that learn; None where all weights do.
        gates: kinds of units that have a gate that learns.
        by_adapters: units are scored by their adapters, which targets must allow.
        teacher: the dense model runs beside it.
        chunk: tokens whose logits exist at a time; None for all.
        cached: the teacher runs before it instead, and this many outcomes of each place are kept on disk; None where it
            does not.
        frozen: no weights of the model learn, and no adapters do.
        own: of a model, the numbers that learn beside its weights, by name; None for none.
        spreads: whether FSDP 2 spreads the model over processes meanwhile, and a live teacher's blocks.
        other: counts another model that teaches in the place of the dense one; None where that does.
    """

    trains: Trains
    phases: Sequence[int | str]
    lora: TunesLora | None
    gates: Sequence[Kind] = ()
    by_adapters: bool = False
    teacher: bool = False
    chunk: int | None = None
    cached: int | None = None
    frozen: bool = False
    own: Callable[[PreTrainedModel], dict[str, int]] | None = None
    spreads: bool = False
    other: Callable[[], Foreign] | None = None

    @property
    def updates(self) -> int | None:
        """Updates in all; the cap, or None without one, where an epoch's length decides."""
        if not all(isinstance(phase, int) for phase in self.phases):
            return self.trains.max_steps
        return sum(self.trains.updates(1, self.phases))

    def passes(self) -> list[Passes]:
        """The passes of the training, and the teacher's."""
        examples = None if self.updates is None else self.updates * self.trains.batch
        own = Passes("training", examples, backwards=1, weights=self.lora is None and not self.frozen)
        if not self.teacher:
            return [own]
        other = self.other and self.other()
        return [own, Passes("teacher", examples, dense=other is None, other=other)]

    def parameters_of_teacher(self, dense: int) -> int:
        """Of the model that teaches, 0 for none. dense: those of the dense one."""
        if not self.teacher:
            return 0
        return dense if self.other is None else self.other().parameters
