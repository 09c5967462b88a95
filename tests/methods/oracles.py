"""Reference outputs under COMPRESSO_DATA: what the public code of Wanda and SparseGPT makes of a seeded 3-layer LLaMA.

Calibration was fed one sequence at a time, in order, in float32. Acceptance: masks agree in at least 99.9 % of each
matrix, weights within 1e-4. `pruned` is 1 where a weight was removed.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.job import Job

FOLDER = Path(os.environ.get("COMPRESSO_DATA", "/nowhere"), "oracles", "mha")
needs_oracles = pytest.mark.skipif(not FOLDER.is_dir(), reason="COMPRESSO_DATA: no oracles/mha")
AGREEMENT, WITHIN = 0.999, 1e-4


def oracle_job(out: Path) -> Job:
    """The dense model with the calibration windows, in order."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = load_file(FOLDER / "tokens.safetensors")["calib_ids"].tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Job(model, arch_for(model.config), None, rows, [], Plan(), {}, {}, 0, out, quiet=True)


def check_masks(job: Job, file: str) -> None:
    """Every matrix' zeros are the reference's, in at least 99.9 % of its entries."""
    wanted = load_file(FOLDER / f"{file}.safetensors")
    assert len(wanted) == 21
    for name, pruned in wanted.items():
        weight = job.model.get_parameter(f"model.layers.{name.removesuffix('.pruned')}.weight")
        assert float(((weight == 0) == pruned.bool()).double().mean()) >= AGREEMENT, name


def check_weights(job: Job, file: str) -> None:
    """Every matrix is the reference's within 1e-4, and so are its zeros in at least 99.9 % of its entries."""
    wanted = load_file(FOLDER / f"{file}.safetensors")
    assert len(wanted) == 21
    for name, weight in wanted.items():
        found = job.model.get_parameter(f"model.layers.{name}").detach()
        assert float(((found == 0) == (weight == 0)).double().mean()) >= AGREEMENT, name
        assert float((found - weight).abs().max()) <= WITHIN, name


@torch.no_grad()
def perplexity(job: Job) -> float:
    """On the oracle's evaluation windows."""
    ids = load_file(FOLDER / "tokens.safetensors")["eval_ids"].long()
    return float(job.model(input_ids=ids, labels=ids).loss.exp())
