"""A loss on held-out examples while something trains: the best state is kept, and training ends when it only rises.

The authors of pruning methods warn that a small model overfits the few examples it recovers on. Looking costs a few
passes over the held-out examples and changes nothing: the model is in evaluation mode, which draws no random number,
and every draw of training is a function of (seed, update, slot) anyway. A run whose held-out loss is lowest at its end
has the weights that it would have had unwatched, bit for bit. What is chosen by a loss is a little better by that loss
than by another of its kind; of at most ten states that is little, and the records say so.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compresso.core.counted import counted
from compresso.training.launch import broadcast
from compresso.training.state import learned, put_

_PREFIX = "held/"


class Watch:
    """Looks at a held-out loss a few times in a run.

    Args:
        score: the loss of the model as it is, nats.
        updates: of the run in all.
        evaluations: how often it is looked at: before the first update, after the last, and evenly between; at least 2.
        patience: how many in a row may be no better than the best before training stops.
    """

    def __init__(self, score: Callable[[], float], updates: int, evaluations: int, patience: int) -> None:
        self._score, self._updates, self._patience = score, updates, patience
        self._points = sorted({round(updates * i / (evaluations - 1)) for i in range(evaluations)})
        self._losses: dict[int, float] = {}
        self._best: dict[str, Tensor] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume must agree on."""
        return {"at": self._points, "patience": self._patience}

    @property
    def best(self) -> int:
        """The update after which the loss was lowest; the first of several."""
        return min(self._losses, key=self._losses.__getitem__)

    @property
    def over(self) -> bool:
        """Whether the last evaluations were no better than the best, as many as patience allows, with updates left."""
        since = [at for at in self._losses if at > self.best]
        return len(since) >= self._patience and max(self._losses) < self._updates

    def look(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        done: int,
        through: Callable[[Callable[[], float]], float] = lambda score: score(),
    ) -> str | None:
        """Evaluate if it is time after `done` updates, and keep the state if it is the best so far; every process must
        call this.

        through: runs what evaluates; of weights that are spread over processes, where they are gathered.

        Returns:
            A line for a person, or None if nothing was done.

        Raises:
            NumericError: the loss is not finite.
        """
        if done not in self._points or done in self._losses:
            return None
        modes = {module: module.training for module in objective.modules()}
        try:
            loss = broadcast(accelerator, through(self._score))  # so that all processes decide alike
        finally:
            for module, mode in modes.items():
                module.training = mode
        before = min(self._losses.values(), default=None)
        self._losses[done] = loss
        if before is None or loss < before:
            self._best = learned(objective)
            return f"held-out loss {loss:.4f} after {counted(done, 'update')}" + (": the best so far" if before else "")
        return f"held-out loss {loss:.4f} after {counted(done, 'update')}; the best is {before:.4f} after {self.best}"

    def settle_(self, objective: nn.Module) -> str:
        """Put the best state back, and say in a sentence which it is and why training ended."""
        if self.best != max(self._losses):
            put_(objective, self._best)
        return self._ending() + (
            "; the last state is the best"
            if self.best == max(self._losses)
            else f"; the state after {self.best} is kept"
        )

    def facts(self) -> dict[str, Any]:
        """For records: the losses, which state was kept, after how many updates training ended, and why."""
        return {
            "held": {
                "update": list(self._losses),
                "loss": list(self._losses.values()),
                "best": self.best,
                "ended": max(self._losses),
                "why": self._ending(),
            }
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        found = {
            "at": torch.tensor(list(self._losses), dtype=torch.int64),
            "loss": torch.tensor(list(self._losses.values()), dtype=torch.float64),
        } | {f"best/{name}": tensor for name, tensor in self._best.items()}
        return {_PREFIX + name: tensor for name, tensor in found.items()}

    def take_(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint holds of it."""
        at, loss = tensors[f"{_PREFIX}at"].tolist(), tensors[f"{_PREFIX}loss"].tolist()
        self._losses = dict(zip(at, loss, strict=True))
        best = f"{_PREFIX}best/"
        self._best = {name.removeprefix(best): tensor for name, tensor in tensors.items() if name.startswith(best)}

    def _ending(self) -> str:
        ended = max(self._losses)
        if not self.over:
            return "the only update was done" if ended == 1 else f"all {ended} updates were done"
        return (
            f"stopped after {ended} of {self._updates} updates: the held-out loss was no lower in the last"
            f" {counted(self._patience, 'evaluation')}"
        )


def without_watch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors but for those of a watch."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
