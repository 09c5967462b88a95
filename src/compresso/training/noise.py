"""Random numbers that depend on where a run stands and on nothing else.

Every draw of a training run is a function of (seed, update, ...). No generator lives from one update to the next, so
there is no state to save, a resumed run draws what the interrupted one would have drawn, all processes draw the same,
and nobody's use of torch's global generator can shift the sequence.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

EDGE = 1e-6
"""Uniform noise stays this far from 0 and 1, where the hard-concrete sampler's logit would be infinite."""


def mixed_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers or names, such that neighbouring numbers give unrelated seeds.

    >>> mixed_seed(0, 1) != mixed_seed(1, 0)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(*parts))


def gate_noise(
    seed: int, update: int, n_gates: int, rows: range | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform noise for the hard-concrete gates of one update, in [EDGE, 1 - EDGE], float32.

    It is drawn on the CPU and then moved, so that every device sees the same gates.

    Args:
        seed: the run's seed.
        update: index of the update; all its micro-batches and processes share it.
        n_gates: gates in all.
        rows: None for one draw that the whole global batch shares; positions within the global batch (`Micro.rows`) for
            one draw per example. The draw of an example depends on its position alone, not on how the batch is split.
        device: where the result goes.

    Returns:
        u [n_gates], or u [len(rows), n_gates].
    """
    if rows is None:
        u = torch.rand(n_gates, generator=_generator("gates", seed, update))
    else:
        u = torch.empty(len(rows), n_gates)
        for i, row in enumerate(rows):
            torch.rand(n_gates, generator=_generator("gates", seed, update, row), out=u[i])
    return u.mul_(1 - 2 * EDGE).add_(EDGE).to(device)


class NoiseAhead:
    """`gate_noise` of one run, the next of which is drawn while a device computes with the last: for 360,000 gates an
    example takes milliseconds of a processor, in which the device would have nothing to do.

    What comes next is guessed from what came after the same rows before, at first the same rows of the next update. A
    wrong guess costs its draw and changes nothing.
    """

    def __init__(self, seed: int, n_gates: int, device: torch.device, threaded: bool | None = None) -> None:
        """seed, n_gates, device: as of `gate_noise`; threaded: whether to draw ahead, None on a GPU only."""
        self._seed, self._n_gates, self._device = seed, n_gates, device
        self._threaded = device.type == "cuda" if threaded is None else threaded
        self._thread: ThreadPoolExecutor | None = None
        self._begun: tuple[int, range | None] | None = None
        self._ahead: Future[Tensor] | None = None
        self._last: tuple[int, range | None] | None = None
        self._after: dict[range | None, tuple[int, range | None]] = {}

    def draw(self, update: int, rows: range | None = None) -> Tensor:
        """As `gate_noise`."""
        if not self._threaded:
            return gate_noise(self._seed, update, self._n_gates, rows, self._device)
        ahead = self._ahead if self._begun == (update, rows) else None
        drawn = self._drawn(update, rows) if ahead is None else ahead.result()
        if self._last is not None:
            self._after[self._last[1]] = (update - self._last[0], rows)
        self._last = (update, rows)
        later, others = self._after.get(rows, (1, rows))
        self._begun = (update + later, others)
        self._thread = self._thread or ThreadPoolExecutor(1, "gate noise")
        self._ahead = self._thread.submit(self._drawn, *self._begun)
        return drawn.to(self._device, non_blocking=True)

    def _drawn(self, update: int, rows: range | None) -> Tensor:
        """On the CPU, where the device can fetch it by itself."""
        noise = gate_noise(self._seed, update, self._n_gates, rows)
        if self._device.type != "cuda":
            return noise
        with torch.cuda.device(self._device):
            return noise.pin_memory()
