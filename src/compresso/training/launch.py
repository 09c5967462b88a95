"""How many processes there are and how they agree: a thin layer over accelerate.

Accelerate decides from the environment that `accelerate launch` or `torchrun` set: one process, DDP, or FSDP 2.
Whatever it would do differently from what the training loop was tested with (FSDP 1, DeepSpeed, sharding on CPUs, which
accelerate ignores) is refused here. Mixed precision is not left to accelerate: it would rewrite the objective's
`forward` for good, and under FSDP cast the gates themselves to bf16; the loop opens `torch.autocast` instead.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import Tensor, nn

from compresso.errors import RecipeError, ResourceError

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)
"""How long processes wait for each other: for the main one's evaluation, which takes hours for a large model. The
launcher ends those whose partner died.
"""
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def processes() -> int:
    """How many processes were launched, without starting anything."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one of those launched that owns the folders, without starting anything."""
    return int(os.environ.get("RANK", "0")) == 0


def new_accelerator(device: torch.device) -> Accelerator:
    """An accelerator for this process: on `device` if it is alone, else on its share of the devices of that type.

    Raises:
        ResourceError: launched in a way that the training loop does not support.
    """
    remembered = {"_mixed_precision": "no", **PartialState._shared_state, **AcceleratorState._shared_state}
    alone = remembered.get("num_processes") == 1
    if alone and (remembered["device"].type != device.type or remembered["_mixed_precision"] != "no"):
        # accelerate remembers the settings of its first use in this process; an earlier run on another device must not
        # decide for this one
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.index is not None and processes() == 1:
        torch.cuda.set_device(device)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # gates take no part in a LoRA-only phase
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[unused, waiting])
    _refuse_untested(accelerator)
    return accelerator


def _refuse_untested(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind not in _SUPPORTED:
        raise ResourceError(
            f"launched as {kind.value}, which is not supported; launch with DDP (--multi_gpu), or FSDP 2 (--use_fsdp"
            " --fsdp_version 2)"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and kind != DistributedType.FSDP:
        raise ResourceError(
            "FSDP was asked for, but accelerate shards on GPUs only and would train unsharded here; drop --use_fsdp"
        )
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ResourceError("FSDP 1 flattens parameters of different groups together; launch with --fsdp_version 2")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # pyright: ignore[reportOptionalMemberAccess]


def prepare(accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Place the objective and wrap it for the launched processes; the optimizer's parameters follow it, in place.

    Returns:
        The module to call: the objective, or its DDP wrapper.
    """
    model, _ = accelerator.prepare(objective, optimizer)
    if hasattr(objective, "_is_accelerate_prepared"):
        del objective._is_accelerate_prepared  # or the next run on this objective would get it back unprepared
    return model


def summed(accelerator: Accelerator, numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """The sums over all processes of scalars, in float64; the same names in every process. One transfer, one wait for
    the device.
    """
    vector = torch.stack([n.detach().to(accelerator.device, torch.float64) for n in numbers.values()])
    sums: Tensor = accelerator.reduce(vector, "sum")  # pyright: ignore[reportAssignmentType]
    return dict(zip(numbers, sums.tolist(), strict=True))


def broadcast(accelerator: Accelerator, value: Value) -> Value:
    """The main process' value, in every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def accumulation(batch: int, micro_batch: int, n: int | None = None) -> int:
    """Micro-batches per process that make up an update of `batch` examples.

    n: processes; None for those that were launched.

    Raises:
        RecipeError: if `batch` cannot be shared out equally.
    """
    n = processes() if n is None else n
    share, rest = divmod(batch, n)
    size = min(micro_batch, share)
    if rest or not share or share % size:
        raise RecipeError(
            f"batch={batch} cannot be split into micro-batches of {micro_batch} on {n} processes; choose multiples"
        )
    return share // size
