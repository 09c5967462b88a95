"""Training on several sources whose shares follow where a model has lost most (LoRAShear, arXiv 2310.18356, dynamic
knowledge recovery).

The shares are a buffer of the objective, so that checkpoints carry them; which examples an update sees is a function of
them and of (seed, update, position), so a resumed run draws what the interrupted one would have drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresso.core.loss import TrainingLoss
from compresso.training.noise import mixed_seed
from compresso.training.objectives import LossObjective


class MixedObjective(LossObjective):
    """A loss that also owns the shares of its sources."""

    lost: Tensor
    """How much higher the loss on each source is than it was [sources], float64, nats a token."""

    def __init__(self, model: nn.Module, loss: TrainingLoss, lost: Tensor) -> None:
        """model: with adapters; loss: what it minimises on a batch; lost: before training [sources]."""
        super().__init__(model, loss)
        self.register_buffer("lost", lost.double().clone())


def shares(lost: Tensor, taking_part: Tensor, rows: Tensor) -> Tensor:
    """The share of each source in an update [sources], float64, sum 1: in proportion to what was lost, where anything
    was.

    Args:
        lost: rise of the loss on each source [sources]; below 0 counts as 0.
        taking_part: the sources of the running stage [sources], bool, at least one.
        rows: examples of each source [sources], which decide if nothing was lost.

    >>> shares(torch.tensor([0.3, 0.1, -0.2, 9.0]), torch.tensor([True, True, True, False]), torch.ones(4))
    tensor([0.7500, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    weights = lost.double().clamp(min=0) * taking_part
    if not bool(weights.sum() > 0):
        weights = rows.double() * taking_part
    return weights / weights.sum()


class MixedBatches:
    """Batches whose examples are drawn, with replacement, from sources in shares that may change from update to update.

    Args:
        sources: examples of each, none of them empty.
        global_batch: examples an update.
        collate: makes a batch of tensors from a list of examples.
        seed: of the draws.
        shares: of the sources at an update [sources], sum 1.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Any]],
        global_batch: int,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        seed: int,
        shares: Callable[[int], Tensor],
    ) -> None:
        self._sources, self._global_batch, self._collate, self._seed, self._shares = (
            sources,
            global_batch,
            collate,
            seed,
            shares,
        )

    @property
    def global_batch(self) -> int:
        """Examples that one update sees, over all processes and micro-batches."""
        return self._global_batch

    def drawn(self, update: int, rows: range) -> list[tuple[int, int]]:
        """(source, index in it) of the given rows of an update's global batch."""
        generator = torch.Generator().manual_seed(mixed_seed("mixture", self._seed, update))
        places = torch.rand(self._global_batch, 2, generator=generator, dtype=torch.float64)
        edges = self._shares(update).cpu().cumsum(0)
        of = torch.searchsorted(edges, places[:, 0] * edges[-1], right=True).clamp(max=len(edges) - 1)
        return [(int(of[row]), int(places[row, 1] * len(self._sources[int(of[row])]))) for row in rows]

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """The given rows of the global batch of an update; tensors [len(rows), ...] on the CPU."""
        return self._collate([self._sources[source][index] for source, index in self.drawn(update, rows)])


def logged(shares: Tensor, lost: Tensor) -> Mapping[str, float]:
    """Shares and losses by the number of their source, to log."""
    return {
        f"{name}_{i}": float(value)
        for name, values in (("share", shares), ("lost", lost))
        for i, value in enumerate(values)
    }
