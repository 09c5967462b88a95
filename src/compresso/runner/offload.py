"""Runs on models larger than memory: the job whose weights stay on disk, and the estimate that is said and kept before
it starts.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compresso.checkpoint.source import open_source
from compresso.job import Job
from compresso.runner.output import stored_dtype
from compresso.runner.preflight import Prepared
from compresso.stage import Sweeps, learned_bytes
from compresso.sweep.memory import estimate, give_back_large_blocks_, refuse_above
from compresso.sweep.offload import Offloaded
from compresso.training.launch import is_main_process

log = logging.getLogger(__name__)


def computed_in(prepared: Prepared) -> torch.dtype:
    """The dtype of weights in memory: float32 on a CPU, where bfloat16 would round small updates away, else the stored
    one.
    """
    return torch.float32 if prepared.device.type == "cpu" else stored_dtype(prepared.source)


def offloaded_job(job: Job, prepared: Prepared, *, over_memory: bool) -> Job:
    """The job with its weights on disk, once the estimate of its memory was said.

    Raises ResourceError if it takes more memory than there is and nobody insists. Several processes take as much each.
    """
    dtype = computed_in(prepared)
    (_, stage) = prepared.recipe.stages[0]
    assert isinstance(stage, Sweeps)  # the preflight lets no other pass
    groups, lengths = stage.check(job.model, job.arch), [len(row["input_ids"]) for row in job.rows]
    held = (stage.keeps_moments, learned_bytes(stage))
    needed = estimate(job.model, job.arch, groups, stage.calibration, lengths, dtype, *held)
    if not job.quiet and is_main_process():
        log.warning("memory: %s", needed.words())
    if not over_memory:
        refuse_above(needed, prepared.device)
    give_back_large_blocks_()
    offloaded = Offloaded(prepared.source, dtype, prepared.device)
    return replace(job, model=offloaded.model, offloaded=offloaded, original=None)


def opened_offloaded(folder: Path, prepared: Prepared) -> PreTrainedModel:
    """A written checkpoint whose weights are read as they are needed; it can be called."""
    offloaded = Offloaded(open_source(folder), computed_in(prepared), prepared.device)
    offloaded.attach_()
    return offloaded.model
