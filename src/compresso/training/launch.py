"""How many processes there are and how they agree: a thin layer over accelerate.

Accelerate decides from the environment that `accelerate launch` or `torchrun` set: one process, or several under DDP.
FSDP 2 is asked for in that environment, too, and is not left to accelerate, which ignores it on CPUs and has no way
back to whole tensors: `training/shards.py` spreads the weights, for the length of a training loop. Whatever the loop
was not tested with (FSDP 1, its offloading, DeepSpeed) is refused here. Mixed precision is not left to accelerate
either: it would rewrite the objective's `forward` for good; the loop opens `torch.autocast` instead.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    patch_environment,
)
from torch import Tensor, nn

from compresso.errors import RecipeError, ResourceError

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)
"""How long processes wait for each other: for the main one's evaluation, which takes hours for a large model. The
launcher ends those whose partner died.
"""
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_UNSUPPORTED_SHARDING = {
    "FSDP_OFFLOAD_PARAMS": ("weights and optimizer state on the CPU", "--fsdp_offload_params"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "recomputation, which is the knob checkpointing: true",
        "--fsdp_activation_checkpointing",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a mesh of several dimensions", "--use_parallelism_config"),
}
"""What FSDP can be asked for and is not done: variable -> what, and the launcher's flag."""


def processes() -> int:
    """How many processes were launched, without starting anything."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one of those launched that owns the folders, without starting anything."""
    return int(os.environ.get("RANK", "0")) == 0


def sharding() -> bool:
    """Whether training loops were asked to spread weights over the launched processes (FSDP 2): by `accelerate launch
    --use_fsdp --fsdp_version 2`, or by the variables that it sets, ACCELERATE_USE_FSDP=true and FSDP_VERSION=2.

    Raises:
        ResourceError: in a way that is not supported, or with one process.
    """
    if not _on("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ResourceError(
            f"FSDP {version} was asked for, which flattens parameters of different groups together; launch with"
            " --fsdp_version 2"
        )
    for variable, (what, flag) in _UNSUPPORTED_SHARDING.items():
        if _on(variable):
            raise ResourceError(f"FSDP was asked for {what}, which it does not do here; launch without {flag}")
    if os.environ.get("FSDP_IGNORED_MODULES", "").lower() not in ("", "none"):
        raise ResourceError(
            "FSDP was asked to leave modules out (FSDP_IGNORED_MODULES), and spreads all blocks here; unset it"
        )
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in (
        "false",
        "0",
        "shard_grad_op",
        "no_shard",
        "no_reshard",
    ):
        raise ResourceError(
            "FSDP was asked to keep weights gathered behind the forward pass, which it does not do here; launch without"
            " --fsdp_reshard_after_forward"
        )
    if processes() == 1:
        raise ResourceError(
            "FSDP was asked for, and one process was launched, so there is nothing to spread weights over; launch"
            " several (--num_processes), or drop --use_fsdp"
        )
    return True


def _on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within the context every process reads all weights. Told of FSDP by the launcher, transformers would read them in
    one process alone, and leave the others with empty tensors.
    """
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield


def new_accelerator(device: torch.device) -> Accelerator:
    """An accelerator for this process: on `device` if it is alone, else on its share of the devices of that type.

    Raises:
        ResourceError: launched in a way that the training loop does not support.
    """
    sharding()  # refuses what is not supported
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
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[unused, waiting])
    kind = accelerator.distributed_type
    if kind not in _SUPPORTED:
        raise ResourceError(
            f"launched as {kind.value}, which is not supported; launch with DDP (--multi_gpu), or FSDP 2 (--use_fsdp"
            " --fsdp_version 2)"
        )
    return accelerator


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


def accumulation(batch: int, micro_batch: int, n: int | None = None, stage: str = "") -> int:
    """Micro-batches per process that make up an update of `batch` examples.

    Args:
        batch, micro_batch: examples of an update, and at most at a time in a process.
        n: processes; None for those that were launched.
        stage: named where that cannot be.

    Raises:
        RecipeError: if `batch` cannot be shared out equally.
    """
    n = processes() if n is None else n
    share, rest = divmod(batch, n)
    size = min(micro_batch, share)
    if rest or not share or share % size:
        named = f"stage '{stage}': " if stage else ""
        raise RecipeError(
            f"{named}batch={batch} cannot be split into micro-batches of {micro_batch} on {n} processes; choose"
            " multiples"
        )
    return share // size
