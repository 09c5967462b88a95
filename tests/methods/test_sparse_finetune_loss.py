"""What SquareHead is for: at 70 % zeros and with few examples, which labels alone overfit, its held-out loss is lower.

With as many fresh examples as updates ask for the two are not told apart here.
"""

import copy
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.job import Job
from compresso.methods.sparse_finetune import SparseFinetune
from compresso.methods.sparsegpt import SparseGpt
from compresso.metrics.held import held_loss

SIGNS, LENGTH = 16, 32
KNOBS: dict[str, Any] = {"steps": 60, "batch": 8, "micro_batch": 8, "lr": 3e-3, "warmup": 0, "precision": "no"}
SPARSE: dict[str, Any] = {"sparsity": 0.7, "calibration": {"examples": 64, "batch": 16}}
STUDENT_T = 2.776
"""Two-sided 95 % with four degrees of freedom."""


def sentences(n: int, seed: int) -> list[Row]:
    """Rows of a language in which the next sign depends, by chance, on the last two."""
    table = torch.softmax(2.5 * torch.randn(SIGNS, SIGNS, SIGNS, generator=torch.Generator().manual_seed(11)), -1)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(SIGNS, (n, 2), generator=generator)
    for _ in range(LENGTH - 2):
        after = torch.multinomial(table[signs[:, -2], signs[:, -1]], 1, generator=generator)
        signs = torch.cat([signs, after], dim=1)
    return [{"input_ids": row, "labels": row} for row in (signs + 1).tolist()]


def taught() -> LlamaForCausalLM:
    """A tiny decoder that knows the language."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=160,
        vocab_size=32,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model, updates = LlamaForCausalLM(config), 200
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.tensor([row["input_ids"] for row in sentences(32 * updates, 1)])
    for update, rows in enumerate(ids.split(32)):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_with_squarehead_the_loss_ends_lower_than_with_labels_alone(tmp_path: Path) -> None:
    """The spec's test e, in pairs of one pruned model and one order of examples: the interval lies below 0."""
    dense: Any = taught()
    rows, held = sentences(48, 3), sentences(128, 5)
    base = Job(
        model=dense,
        arch=arch_for(dense.config),
        tokenizer=None,
        rows=rows,
        held=held,
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=tmp_path,
        quiet=True,
        original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype),
    )
    gaps: list[float] = []
    for seed in range(5):
        job = replace(base, model=copy.deepcopy(dense), seed=seed, out=tmp_path / f"{seed}")
        job = SparseGpt(**SPARSE)(job)
        ends = [
            held_loss(
                SparseFinetune(**{**KNOBS, "feature_weight": weight})(
                    replace(job, model=copy.deepcopy(job.model), out=tmp_path / f"{seed} {weight}")
                ).model,
                held,
                64,
            ).mean
            for weight in (1.0, 0.0)
        ]
        gaps.append(ends[0] - ends[1])
    half = STUDENT_T * statistics.stdev(gaps) / math.sqrt(len(gaps))
    assert statistics.fmean(gaps) + half < 0, gaps
