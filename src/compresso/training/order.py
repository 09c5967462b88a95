"""Which examples an update sees: a function of (seed, update), the same however the work is split.

The examples form one endless stream: a permutation of the dataset, then another one, and so on. Update u owns the B
positions from u * B on, where B is the global batch; the end of an epoch is no border, so every batch is full.
Processes and micro-batches share out those B rows, therefore N processes with A micro-batches each see exactly what one
process with N * A sees, and the number of finished updates is the whole data cursor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from compresso.errors import CompressoError, DataError
from compresso.training.noise import mixed_seed


@dataclass(frozen=True, slots=True)
class Micro:
    """Where a micro-batch stands.

    Args:
        update: index of the update, from 0.
        slot: index of this micro-batch among all of the update, `micro * processes + rank`, in 0 .. accumulation *
            processes - 1.
        rows: positions of its examples within the update's global batch.
    """

    update: int
    slot: int
    rows: range


class Batches(Protocol):
    """A stateless source of batches."""

    @property
    def global_batch(self) -> int:
        """Examples that one update sees, over all processes and micro-batches."""
        ...

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """The given rows of the global batch of an update; tensors [len(rows), ...] on the CPU."""
        ...


class ShuffledBatches:
    """Batches of a dataset held in memory, permuted anew in every epoch.

    Args:
        dataset: the examples, tokenised.
        global_batch: examples an update.
        collate: makes a batch of tensors from a list of examples.
        seed: of the permutations.
        again: an example and a seed of this pass over the data -> the example as this pass sees it; None leaves it.

    Raises:
        DataError: the dataset is empty.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        global_batch: int,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        seed: int,
        again: Callable[[Any, int], Any] | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise DataError(
                "the training data holds 0 examples, at least 1 is needed; check the path, the format and the filters"
            )
        if global_batch < 1:
            raise DataError(f"global_batch={global_batch}, at least 1 example an update is needed")
        self._dataset = dataset
        self._collate = collate
        self._global_batch = global_batch
        self._seed, self._again = seed, again
        n = len(dataset)

        @lru_cache(maxsize=2)
        def permutation(epoch: int) -> list[int]:
            return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed("order", seed, epoch))).tolist()

        self._permutation = permutation

    @property
    def global_batch(self) -> int:
        """Examples that one update sees, over all processes and micro-batches."""
        return self._global_batch

    @property
    def examples(self) -> int:
        """How many the dataset holds: an epoch."""
        return len(self._dataset)

    def indices(self, update: int, rows: range) -> list[int]:
        """Dataset indices behind the given rows of an update's global batch."""
        n = len(self._dataset)
        stream = [update * self._global_batch + row for row in rows]
        return [self._permutation(position // n)[position % n] for position in stream]

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """The given rows of the global batch of an update; tensors [len(rows), ...] on the CPU."""
        chosen = self.indices(update, rows)
        if self._again is None:
            return self._collate([self._dataset[i] for i in chosen])
        n, first = len(self._dataset), update * self._global_batch
        passes = [(first + row) // n for row in rows]
        return self._collate(
            [
                self._again(self._dataset[i], mixed_seed("again", self._seed, epoch, i))
                for i, epoch in zip(chosen, passes, strict=True)
            ]
        )


def micros_of(update: int, global_batch: int, accumulation: int, rank: int, processes: int) -> list[Micro]:
    """The micro-batches that one process works through in an update, in order.

    Raises:
        CompressoError: the global batch cannot be shared out equally.
    """
    slots = accumulation * processes
    if accumulation < 1 or global_batch % slots:
        raise CompressoError(
            f"a global batch of {global_batch} cannot be split over {processes} processes x {accumulation}"
            f" micro-batches; choose a multiple of {max(slots, 1)}, or another accumulation"
        )
    size = global_batch // slots
    taken = [micro * processes + rank for micro in range(accumulation)]
    return [Micro(update, slot, range(slot * size, (slot + 1) * size)) for slot in taken]
