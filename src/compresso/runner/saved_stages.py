"""What a finished stage leaves for a resume: weights of whatever widths, the plan that led to them, and the records so
far.

Families with a native layout are written in it and opened as any checkpoint. Others have no form for layers of
different widths: their tensors are written alone, and the widths come back by shrinking the original once more by the
plan.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import WITHIN, axes_of
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import Source, open_source
from compresso.core.plan import Plan
from compresso.edit.patches import save_tensors, written
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.errors import ResumeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.native import family_of

_TENSORS = "tensors.safetensors"


def save_stage(job: Job, before: Mapping[str, Any], folder: Path, whole: bool = False) -> None:
    """Write a finished stage into a folder.

    whole: as a checkpoint that can be opened by itself, in whatever layout holds the model.
    """
    records = {"before": before, "stages": job.records, "patches": written(job.patches)}
    files = {"plan.json": job.plan.to_json(), "records.json": json.dumps(records, indent=2, allow_nan=False) + "\n"}
    if family_of(job.model.config.model_type) is not None:
        save_checkpoint(
            job.model, job.arch.shapes(job.model), folder, layout="native", tokenizer=job.tokenizer, files=files
        )
    elif whole:
        save_checkpoint(
            job.model, job.arch.shapes(job.model), folder, layout="auto", tokenizer=job.tokenizer, files=files
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in _tensors(job.model).items()}, folder / _TENSORS)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    save_tensors(job.patches, folder)


def load_stage(
    folder: Path, original: Source, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Plan, dict[str, Any]]:
    """The model of a finished stage, the plan that led to it and its records.

    Raises ResumeError if its tensors are not those of the original under that plan.
    """
    facts, plan = read_json(folder / "records.json"), Plan.from_json((folder / "plan.json").read_text("utf-8"))
    if not (folder / _TENSORS).is_file():
        return as_stock(load_model(open_source(folder), dtype=dtype, device=device)), plan, facts
    model = as_stock(load_model(original, dtype=dtype, device=device))
    shrink_(model, axes_of(arch_for(model.config), model, WITHIN), plan)
    saved, have = load_file(folder / _TENSORS), _tensors(model)
    for name in sorted(saved.keys() | have.keys()):
        if name not in saved or name not in have or saved[name].shape != have[name].shape:
            there = list(saved[name].shape) if name in saved else "absent"
            raise ResumeError(
                f"{name} is {there} in {folder.name}, which the plan does not give; start anew with --overwrite"
            )
        have[name].copy_(saved[name])
    return model, plan, facts


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that checkpoints hold; detached, not copied."""
    kept = model.state_dict(keep_vars=True)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return named | {name: buffer.detach() for name, buffer in model.named_buffers() if name in kept}
