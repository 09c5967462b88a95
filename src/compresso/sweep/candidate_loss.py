"""The loss of candidates of a search, each put together in the model that lies in memory.

`compresso.sweep.candidates` compares with the dense model and keeps what blocks read; here nothing is kept, and the
loss is whatever it is of.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from compresso.errors import NumericError
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Levels
from compresso.sweep.candidates import Install


@contextmanager
def candidate_loss(
    model: PreTrainedModel,
    at: Sequence[int],
    install: Install,
    dense: Levels,
    loss: Callable[[PreTrainedModel], float],
) -> Iterator[Fitness]:
    """A fitness: the loss of the model at levels, NaN where it is not finite. At the end of the context the model is
    dense again, and in its mode.

    Args:
        model: dense.
        at: the block of each item.
        install: see `Install`.
        dense: the levels that the model is at.
        loss: of the model as it is. Raises NumericError if it is not finite.
    """
    places = {block: [i for i, one in enumerate(at) if one == block] for block in sorted(set(at))}
    now = dense

    def put(levels: Levels) -> None:
        nonlocal now
        for block, here in places.items():
            if any(levels[i] != now[i] for i in here):
                install(block, tuple(levels[i] for i in here))
        now = levels

    def fitness(levels: Levels, stage: int, /) -> float:
        put(levels)
        try:
            return loss(model)
        except NumericError:
            return float("nan")

    was_training = model.training
    model.eval()
    try:
        yield fitness
    finally:
        put(dense)
        model.train(was_training)
