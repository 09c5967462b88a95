"""The launched processes as work outside the training loop sees them: what each takes, what they add up and agree on.

A pass over calibration data is shared out by batches, in a fixed order: process r of n takes batches r, r + n, ... So a
forward pass is one that a single process would have made, whatever depends on the tokens of its batch included, and
processes differ from one process in the order of additions alone. Sums and counts are added up, never means.

Whatever is decided from sums is decided in every process from the same numbers, and what is written is the main
process'. An error of one process is raised in all of them, before they wait for each other.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from compresso.errors import CompressoError, Interrupted
from compresso.training.launch import PATIENCE, processes
from compresso.training.signals import SIGNALS, Requests

log = logging.getLogger(__name__)
Value = TypeVar("Value")
Across = Literal["sum", "max"]
"""How one number is made of those of all processes."""
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Ranks:
    """The launched processes, from one of them. All of them call each method that is not marked as its own, in the same
    order.

    Args:
        rank: of this process, from 0, which is the main one.
        n: how many there are.
    """

    rank: int = 0
    n: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes and speaks; its own."""
        return self.rank == 0

    def mine(self, items: Sequence[Value]) -> list[Value]:
        """This process' share of some items; its own."""
        return list(items[self.rank :: self.n])

    def warn_of_idle(self, stage: str, n_batches: int) -> None:
        """Say that some processes have nothing to do, where that is so; the main one's own."""
        if self.is_main and n_batches < self.n:
            log.warning(
                "%s: %d of %d processes have no batch of calibration rows; fewer rows a batch, or more examples, give"
                " them one",
                stage,
                self.n - n_batches,
                self.n,
            )

    def own(self, folder: Path) -> Path:
        """A folder below another where no other process writes; its own."""
        return folder if self.n == 1 else folder / f"process-{self.rank}-of-{self.n}"

    def added_(self, total: Tensor, how: Across = "sum") -> Tensor:
        """Put what all processes have together in the place of what this one has: any shape, the same in all.

        The numbers keep their dtype; float32 sums of n processes differ from those of one by rounding (n - 1 additions
        an entry, 6e-8 of the sum of absolutes each).
        """
        if self.n > 1:
            there = total.detach().to(_device()).contiguous()
            dist.all_reduce(there, _OPERATIONS[how])
            if there is not total:
                total.detach().copy_(there)
        return total

    def copied_(self, tensors: Iterable[Tensor]) -> None:
        """Put the main process' numbers in the place of this one's."""
        for tensor in tensors if self.n > 1 else ():
            there = tensor.detach().to(_device()).contiguous()
            dist.broadcast(there, src=0)
            tensor.detach().copy_(there)

    def agreed(self, value: Value) -> Value:
        """The main process' value, in every process."""
        box = [value]
        if self.n > 1:
            dist.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    def told(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        values = [value] * self.n
        if self.n > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.told(None)

    @contextmanager
    def failing_alike(self) -> Iterator[None]:
        """What one process raises within the context, all raise at its end. Nothing inside may wait for another
        process.
        """
        problem: CompressoError | Interrupted | None = None
        try:
            yield
        except (CompressoError, Interrupted) as error:
            if self.n == 1:
                raise
            problem = error
        if self.n > 1:
            first = next((one for one in self.told(problem) if one is not None), None)
            if first is not None:
                raise problem or first

    def obey(self, requests: Requests, saved: str | None) -> None:
        """Stop in all processes if a signal reached one of them; `saved` is as `Requests.obey` takes it.

        Raises:
            Interrupted: one did.
        """
        arrived = set[Signals]().union(*self.told(requests.arrived))
        for number in reversed(SIGNALS):
            if number in arrived:
                raise Interrupted(number, saved)


ALONE = Ranks()
"""One process, which waits for nobody."""


def ranks() -> Ranks:
    """The processes that were launched; they are connected if they are not yet."""
    if processes() == 1:
        return ALONE
    state = (
        PartialState()
        if PartialState._shared_state
        else PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    )
    return Ranks(state.process_index, state.num_processes)


def _device() -> torch.device:
    """Where numbers have to lie to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
