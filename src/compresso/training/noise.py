"""Random numbers that depend on where a run stands and on nothing else.

Every draw of a training run is a function of (seed, update, ...). No generator lives from one update to the next, so
there is no state to save, a resumed run draws what the interrupted one would have drawn, all processes draw the same,
and nobody's use of torch's global generator can shift the sequence.
"""

import hashlib

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
