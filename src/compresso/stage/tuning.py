"""What stages that train have in common: what learns, fitting with a job's seed and a stage's knobs, merge."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.routers import router_parameters
from compresso.core import schedule
from compresso.edit.lora import attach_, merge_, save_adapter
from compresso.edit.precision import cast_
from compresso.edit.recompute import recompute_
from compresso.errors import CheckpointError, RecipeError
from compresso.job import Job
from compresso.stage.knobs import AdamW, Trains, TunesLora, Watches
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.history import History
from compresso.training.launch import accumulation, is_main_process, sharding
from compresso.training.order import Batches
from compresso.training.shards import Shards
from compresso.training.watch import Watch

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def attached(job: Job, lora: TunesLora) -> PeftModel:
    """The job's model, frozen, with new adapters that its seed decides. Raises RecipeError as `attach_`."""
    return attach_(job.model, lora.rank, lora.alpha, lora.targets, lora.dropout, job.seed)


def learner(job: Job, lora: TunesLora | None, routers: bool = False) -> nn.Module:
    """What learns: new adapters on the frozen model, or all of its weights where `lora` is None, or those of its
    routers alone.
    """
    if lora is not None and not routers:
        return attached(job, lora)
    # small updates of all weights would be rounded away in half precision
    model = cast_(cast(nn.Module, job.model), torch.float32).requires_grad_(not routers)
    for parameter in router_parameters(model).values() if routers else ():
        parameter.requires_grad_(True)
    return model


def check_routers(model: nn.Module) -> None:
    """Raise RecipeError if there are no routers to train."""
    if not router_parameters(model):
        raise RecipeError(
            "train: router trains the routers of a mixture of experts, and this model has none; give train: lora"
        )


def router_numbers(model: nn.Module) -> dict[str, int]:
    """How many numbers routers have, for `Learning.own`."""
    return {"router": sum(parameter.numel() for parameter in router_parameters(model).values())}


def frozen_teacher(
    job: Job, dtype: Literal["same", "bf16", "fp32"], device: Literal["same", "cpu"], cure: str = "set Job.original"
) -> PreTrainedModel:
    """The dense model, read anew and frozen.

    Args:
        dtype: it is read in; "same" as the job's model.
        device: it computes on.
        cure: what to do where the job does not know where from.

    Raises:
        CheckpointError: it does not.
    """
    if job.original is None:
        raise CheckpointError(f"the dense model is the teacher here, and this job names none; {cure}")
    place = torch.device("cpu") if device == "cpu" else job.device
    teacher = job.original(_DTYPES.get(dtype, job.model.dtype), place)
    teacher.requires_grad_(False)
    return teacher.eval()


def settled(job: Job, learned: nn.Module, stored: torch.dtype, name: str, trains: Trains) -> Job:
    """The job with what `learner` gave in its model: adapters merged, or weights in the dtype they had.

    Raises:
        NumericError: as `merge_`.
    """
    if isinstance(learned, PeftModel):
        return merged(job, learned, name, trains)
    return replace(job, model=cast(Any, cast_(job.model, stored)).requires_grad_(False))


def group_of(name: str, learning: nn.Module, adamw: AdamW, hidden: int, total: int, weight_decay: float = 0.0) -> Group:
    """A module's parameters that learn, at a rate for this hidden size, scheduled over `total` updates."""
    parameters = [parameter for parameter in learning.parameters() if parameter.requires_grad]
    rate = schedule.rate(adamw.lr_schedule, total, min(adamw.warmup, max(total - 1, 0)))
    lr = schedule.rate_for_width(adamw.lr, adamw.lr_at_hidden, hidden)
    return Group(name, parameters, lr, rate, clip=adamw.clip, weight_decay=weight_decay)


def tune(
    job: Job,
    name: str,
    trains: Trains,
    objective: nn.Module,
    groups: Sequence[Group],
    total: int,
    *,
    batches: Batches | None = None,
    before_step: Callable[[int], None] | None = None,
    after_update: Callable[[int], Mapping[str, float] | None] | None = None,
    phase: Callable[[int], str] | None = None,
    watch: Watch | None = None,
    begin: Callable[[torch.optim.Optimizer], None] | None = None,
    shards: Shards | None = None,
) -> History:
    """`fit` with what a job and a stage's knobs say of it.

    Args:
        job: the run; its checkpoints are continued.
        name: of the stage, which its order of examples depends on.
        trains: the stage's knobs.
        objective, groups, total: as in `fit`, whose `steps` the last is.
        batches: data other than the job's.
        before_step, after_update: as in `fit`.
        phase: the name shown for an update; the stage's if None.
        watch: from `watching`.
        begin: as in `fit`.
        shards: from `shards_of`; None where each process holds the whole model also under FSDP 2, which is said then.

    Raises as `fit`; RecipeError for a batch that cannot be split, DataError without training data.
    """
    if shards is None and sharding() and is_main_process():
        log.warning("%s does not spread weights (FSDP): each process holds the whole model, as under DDP", name)
    with _recomputed(job.model, on=trains.checkpointing):
        return fit(
            objective,
            groups,
            job.batches(trains.batch, name) if batches is None else batches,
            total,
            seed=job.seed,
            accumulation=accumulation(trains.batch, trains.micro_batch, stage=name),
            precision=trains.precision,
            device=job.device,
            before_step=before_step,
            after_update=after_update,
            checkpoints=job.checkpoints(),
            save_every=trains.save_every,
            progress=job.progress(),
            phase=phase or (lambda _: name),
            watch=watch,
            begin=begin,
            shards=shards,
        )


def shards_of(job: Job, teacher: PreTrainedModel | None = None) -> Shards:
    """What of a job's model is spread over processes while it learns, and of the teacher beside it, which may be of
    another architecture.
    """
    beside = () if teacher is None else arch_for(teacher.config).blocks(teacher)
    return Shards(job.model, list(job.arch.blocks(job.model)), list(beside))


def watching(job: Job, watches: Watches, total: int) -> Watch | None:
    """What looks at the job's held-out examples in a training of `total` updates; None where the knobs want nothing.

    Raises:
        RecipeError: there are no held-out examples.
    """
    if not watches.evaluations:
        return None
    if not job.held:
        raise RecipeError(
            f"evaluations={watches.evaluations}, and no examples are held out; give data.held, or evaluations=0"
        )
    # adapters lie inside the job's own model, which is therefore the one that learns
    return Watch(
        lambda: job.task.score(job.model, job.held, job.dense_held).mean, total, watches.evaluations, watches.patience
    )


def merged(job: Job, adapted: PeftModel, name: str, trains: Trains) -> Job:
    """The job with the adapters added to its model's weights; they are kept beside the result if the knobs say so.

    Raises NumericError as `merge_`.
    """
    if trains.save_adapter and job.adapters is not None and PartialState().is_main_process:
        save_adapter(adapted, job.adapters / name)
    return replace(job, model=merge_(adapted))


@contextmanager
def _recomputed(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Within the context a backward pass computes activations anew, if asked."""
    if on:
        recompute_(model, on=True)
    try:
        yield
    finally:
        if on:
            recompute_(model, on=False)
