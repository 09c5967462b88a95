"""Stopping on request: SIGINT and SIGTERM are noted while a run is inside an update, and obeyed at its end."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from compresso.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Requests:
    """The signals that arrived."""

    def __init__(self) -> None:
        self.arrived: set[signal.Signals] = set()
        self._told = False

    def told(self) -> str:
        """What a person should know of a signal that is obeyed only later; "" where none came, and after the first
        time.
        """
        if self._told or not self.arrived:
            return ""
        self._told = True
        names = " and ".join(sorted(one.name for one in self.arrived))
        return f"{names}: the update is finished and saved before the run stops; once more stops it at once"

    def flags(self) -> dict[str, Tensor]:
        """1 or 0 by signal name, for a sum over processes."""
        return {s.name: torch.tensor(float(s in self.arrived)) for s in SIGNALS}

    def obey(self, saved: str | None) -> None:
        """Stop if one arrived, SIGTERM before SIGINT.

        Raises:
            Interrupted: it names where the work is saved, if anywhere.
        """
        for number in reversed(SIGNALS):
            if number in self.arrived:
                raise Interrupted(number, saved)


def asked(sums: Mapping[str, float]) -> signal.Signals | None:
    """The signal to obey, given the sums of all processes' flags; SIGTERM before SIGINT."""
    return next((s for s in reversed(SIGNALS) if sums[s.name] > 0), None)


@contextmanager
def noted_signals() -> Iterator[Requests]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one acts as it did before. Other threads leave signals
    alone.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}

    def restore() -> None:
        for s, handler in before.items():
            # None: installed by C code, which Python cannot put back; the default is the nearest thing
            signal.signal(s, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        requests.arrived.add(signal.Signals(number))
        restore()

    for s in SIGNALS:
        signal.signal(s, note)
    try:
        yield requests
    finally:
        restore()
