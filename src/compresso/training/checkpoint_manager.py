"""Saving and resuming a run whose parameters may be spread over processes: all processes agree, one of them writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from compresso.checkpoint.identity import refuse_other_run
from compresso.errors import CompressoError
from compresso.training.checkpoint import Saved, TrainingCheckpoints
from compresso.training.history import History
from compresso.training.launch import broadcast
from compresso.training.state import collect, is_sharded, restore_
from compresso.training.watch import Watch, without_watch


class CheckpointManager:
    """The checkpoints of one run, or of a run that keeps none.

    Args:
        accelerator: of this process.
        objective: the module that learns.
        optimizer: its optimizer.
        checkpoints: where to, or None.
        run: what the training loop itself adds to the identity of the run.
        watch: what looks at held-out examples on the way, whose state is saved too; None if nothing does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        checkpoints: TrainingCheckpoints | None,
        run: Mapping[str, Any],
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._accelerator, self._objective, self._optimizer, self._checkpoints = (
            accelerator,
            objective,
            optimizer,
            checkpoints,
        )
        self._identity = dict(checkpoints.identity if checkpoints else {}) | {"fit": dict(run)}
        self.saved: str | None = None
        """The newest checkpoint, the same in every process."""

    def resume(self) -> tuple[int, History]:
        """Load the newest checkpoint into the objective and the optimizer.

        Returns:
            Updates done and their log; (0, empty) where there is no checkpoint.

        Raises:
            ResumeError: it belongs to another run.
        """
        found = self._newest()
        if found is None:
            return 0, History()
        refuse_other_run(Path(self.saved or ""), found.identity, self._identity)
        restore_(self._objective, self._optimizer, without_watch(found.tensors))
        if self._watch is not None:
            self._watch.take_(found.tensors)
        return found.update, found.history

    def save(self, done: int, history: History) -> None:
        """Save the state after `done` updates; every process must call this.

        Raises:
            NumericError: the state holds NaN or Inf; nothing was written.
            ResourceError: the disk refused.
        """
        if self._checkpoints is None:
            return
        main = self._accelerator.is_main_process
        path: str | None = None
        error: CompressoError | None = None
        if main or is_sharded(self._objective):  # gathering shards takes all processes
            tensors = collect(self._objective, self._optimizer) | (self._watch.tensors() if self._watch else {})
            if main:
                try:
                    path = str(self._checkpoints.save(Saved(done, tensors, history, self._identity)))
                except CompressoError as refusal:
                    error = refusal
        path, error = broadcast(self._accelerator, (path, error))
        if error is not None:
            raise error
        self.saved = path

    def rewind(self) -> str:
        """Put the parameters and the optimizer back to the newest checkpoint, and say so in a clause."""
        found = self._newest()
        if found is None:
            return "there is no checkpoint to go back to"
        restore_(self._objective, self._optimizer, without_watch(found.tensors))
        return f"the model was put back to update {found.update}"

    def _newest(self) -> Saved | None:
        if self._checkpoints is None:
            return None
        path = self._checkpoints.latest() if self._accelerator.is_main_process else None
        self.saved = broadcast(self._accelerator, None if path is None else str(path))
        return None if self.saved is None else self._checkpoints.load(Path(self.saved))
