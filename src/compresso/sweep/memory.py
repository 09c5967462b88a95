"""How much memory this process may still take, and how much an offloaded sweep will: said before it starts."""

import ctypes
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import ResourceError
from compresso.sweep.calibration import Calibration
from compresso.sweep.targets import Groups, matrix, names_of

OVERHEAD = 200e6
"""What libraries and the allocator take on the way beyond tensors."""


_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 4 << 20


def give_back_large_blocks_() -> None:
    """From now on large tensors that are freed go back to the system at once, in this process; without glibc's malloc
    nothing happens.

    glibc otherwise learns to keep blocks of up to 32 MB, and small objects that land between them keep gigabytes
    reserved.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def available(device: torch.device) -> int:
    """Bytes that this process may still take on a device:
    of the machine, of its own limits and of its control group.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [psutil.virtual_memory().available]
    if sys.platform != "linux":
        return found[0]
    import resource  # not there on every system

    own = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_DATA, getattr(own, "data", own.rss)), (resource.RLIMIT_AS, own.vms)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - used)
    for group in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = group.read_text().strip() if group.is_file() else ""
        if text.isdigit():
            found.append(int(text) - own.rss)
    return max(min(found), 0)


@dataclass(frozen=True)
class Estimate:
    """Bytes that an offloaded sweep takes at its largest, by what takes them."""

    block: int
    around: int
    statistics: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, and what libraries need."""
        return int(max(self.around, self.block + self.statistics) + self.activations + OVERHEAD)

    def words(self) -> str:
        """In a line."""
        parts = ", ".join(
            f"{name} {size / 1e9:.2f} GB"
            for name, size in (
                ("the largest block, while it is written", self.block),
                ("statistics", self.statistics),
                ("activations", self.activations),
                ("embeddings", self.around),
            )
        )
        return f"about {self.total / 1e9:.2f} GB at once ({parts})"


def estimate(
    model: PreTrainedModel,
    arch: Arch,
    groups: Groups,
    calibration: Calibration,
    rows: Iterable[int],
    dtype: torch.dtype,
    keeps_moments: bool = False,
    learned_bytes: int = 0,
) -> Estimate:
    """What one stage of an offloaded run takes.

    Args:
        model: on the meta device.
        arch: of the model.
        groups: the linears that are worked on.
        calibration: what the sweep is calibrated on.
        rows: lengths of the examples, in tokens.
        dtype: of weights and activations.
        keeps_moments: whether a second moment [in, in] of each group is held.
        learned_bytes: held for each weight of the block that is worked on, where it learns with gradients; its dense
            outputs lie beside its inputs then, and what it computes is kept for the way back.
    """
    blocks, size = arch.blocks(model), dtype.itemsize
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    body = sum(p.numel() for p in model.base_model.parameters())
    lengths = sorted(rows, reverse=True)[: calibration.examples]
    one_batch = sum(lengths[: calibration.batch])
    hidden, widest = int(model.config.hidden_size), 0
    statistics = 0
    for here in groups.values():
        inputs = [matrix(model, group.names[0]).shape[1] for group in here]
        widest = max(widest, *inputs, *(sum(matrix(model, name).shape[0] for name in group.names) for group in here))
        if keeps_moments:
            statistics = max(statistics, 4 * (sum(width**2 for width in inputs) + 5 * max(inputs) ** 2))
    learned = learned_bytes * max(
        sum(math.prod(matrix(model, name).shape) for group in here for name in group.names) for here in groups.values()
    )
    edited = (
        3 * 4 * max((math.prod(matrix(model, n).shape) for n in names_of(groups)), default=0)
    )  # a matrix and its scores
    kept = one_batch if calibration.activations == "disk" else sum(lengths)
    scores = int(getattr(model.config, "num_attention_heads", 1)) * max(lengths, default=0)
    times = 2 if learned_bytes else 1
    return Estimate(
        block=2 * max(of_blocks) * size,  # once more while the journal writes it
        around=(body - sum(of_blocks)) * size,
        statistics=statistics + edited + learned,
        activations=times * size * (kept * hidden + one_batch * (8 * hidden + 4 * widest + scores)),
    )


def refuse_above(needed: Estimate, device: torch.device) -> None:
    """Raise ResourceError if a sweep takes more memory than there is."""
    if needed.total > (there := available(device)):
        raise ResourceError(
            f"this needs {needed.words()}, and {there / 1e9:.2f} GB are there. Give fewer or shorter examples, "
            "set calibration.activations to disk, or go on all the same with --over-memory"
        )
