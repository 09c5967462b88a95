"""A micro-batch that does not fit into memory is computed in parts that do: the same gradient up to rounding.

A part's loss is its own mean over its labels, so parts are weighed by how many labels they have. Noise is drawn by an
example's position in the update and stays; dropout draws anew for each part.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.losses import IGNORED
from compresso.errors import ResourceError, out_of_memory, quoted
from compresso.training.order import Batches, Micro

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A part of a micro-batch.

    Args:
        micro: where its rows stand.
        batch: what the model reads, on the CPU.
        weight: its share of the micro-batch's labels.
        part: its number; None if it is the whole.
        last: whether no other part comes after it.
    """

    micro: Micro
    batch: Mapping[str, Tensor]
    weight: float
    part: int | None
    last: bool


class Halving:
    """In how many parts the micro-batches of a run are computed, for one process."""

    def __init__(self, processes: int) -> None:
        """processes: that train together; of several, none may do more passes than the others, so none halves."""
        self.parts = 1
        self._alone = processes == 1

    def pieces(self, micro: Micro, batches: Batches) -> list[Piece]:
        """The parts of a micro-batch, those without a label left out."""
        if self.parts == 1:
            return [Piece(micro, batches.at(micro.update, micro.rows), 1.0, None, True)]
        size, n = len(micro.rows), min(self.parts, len(micro.rows))
        rows = [micro.rows[size * i // n : size * (i + 1) // n] for i in range(n)]
        read = [batches.at(micro.update, some) for some in rows]
        labels = [labels_in(one) for one in read]
        kept = [i for i in range(n) if labels[i]]
        return [
            Piece(Micro(micro.update, micro.slot, rows[i]), read[i], labels[i] / sum(labels), i, i == kept[-1])
            for i in kept
        ]

    def after(self, error: Exception, micros: Sequence[Micro]) -> bool:
        """Whether to do an update again, in more parts, as memory ran out; False for any other error.

        Raises:
            ResourceError: a part is a single example, and that does not fit.
        """
        if not out_of_memory(error) or not self._alone:
            return False
        size = max(len(micro.rows) for micro in micros)
        if self.parts >= size:
            raise ResourceError(
                f"out of memory with a single example ({quoted(error, 200)}); set checkpointing: true,"
                " precision: bf16 or a smaller max_length, or use a device with more memory"
            ) from error
        self.parts *= 2
        log.warning(
            "out of memory: micro-batches of %d examples go on in %d parts, with the same gradient up to rounding;"
            " lower micro_batch to start so",
            size,
            min(self.parts, size),
        )
        return True


def free() -> None:
    """Give back what a device holds of an update that was given up."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def labels_in(batch: Mapping[str, Tensor]) -> int:
    """Over how many labels the mean loss of a batch is: those of next tokens, or one an example."""
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    return int(((labels[:, 1:] if labels.dim() > 1 else labels) != IGNORED).sum())
