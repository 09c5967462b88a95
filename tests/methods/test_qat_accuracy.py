"""What the paper found, on models of seconds: an encoder that 4-bit rounding breaks is itself again once it was trained
with it, and a decoder loses by its activations, not by its weights.
"""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.methods.finetune import Finetune
from compresso.methods.qat import Qat
from compresso.methods.recover import Recover
from compresso.metrics.labels import label_score
from compresso.tasks.classification import CLASSIFICATION
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import from_dense

LOUD = 16.0
TUNED: dict[str, Any] = {"steps": 300, "batch": 32, "micro_batch": 32, "lr": 3e-3}
TAUGHT: dict[str, Any] = {"steps": 120, "batch": 32, "micro_batch": 32, "lr": 1e-3, "warmup": 10}
FITTED: dict[str, Any] = {"steps": 100, "batch": 16, "micro_batch": 16, "lr": 1e-2, "rank": 16}


def counting(folder: Path) -> Job:
    """A tiny encoder that counts marks among other tokens, 0 to 9."""
    draw = random.Random(0)
    rows: list[dict[str, list[int]]] = []
    for _ in range(1200):
        marks = draw.randint(0, 9)
        ids = [draw.choice((4, 5)) for _ in range(marks)] + [draw.randrange(8, 24) for _ in range(12 - marks)]
        draw.shuffle(ids)
        rows.append({"input_ids": [2, *ids, 3], "labels": [marks]})
    config = BertConfig(
        vocab_size=24,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={i: str(i) for i in range(10)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    return Job(
        model=model,
        arch=arch_for(config),
        tokenizer=None,
        rows=rows[200:],  # type: ignore[arg-type]
        held=rows[:200],  # type: ignore[arg-type]
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=folder / "tuned",
        quiet=True,
        task=CLASSIFICATION,
        labels=tuple(map(str, range(10))),
    )


@torch.no_grad()
def with_loud_channels(job: Job) -> Job:
    """The same function, in which one value channel of each head is larger: an outlier as large models have them."""
    for layer in job.arch.blocks(job.model):
        value, output = (layer.get_submodule(name) for name in ("attention.self.value", "attention.output.dense"))
        value.get_parameter("weight")[::8] *= LOUD
        value.get_parameter("bias")[::8] *= LOUD
        output.get_parameter("weight")[:, ::8] /= LOUD
    return job


def rounding(job: Job, folder: Path) -> Callable[..., Job]:
    """Stages of the job as it is, which is their teacher."""
    dense, n = copy.deepcopy(job.model), iter(range(100))

    def rounded(**knobs: Any) -> Job:
        model = copy.deepcopy(dense)
        original = lambda _, __: copy.deepcopy(dense)  # noqa: E731
        return Qat(**{**TAUGHT, **knobs})(
            replace(job, model=model, original=original, records={}, out=folder / str(next(n)))
        )

    return rounded


def accuracy(job: Job) -> float:
    return label_score(job.model, job.held, job.collated).accuracy


@pytest.mark.slow
def test_an_encoder_keeps_its_accuracy_at_4_bits_once_trained_for_them(tmp_path: Path) -> None:
    dense = with_loud_channels(Finetune(**TUNED)(counting(tmp_path)))
    rounded = rounding(dense, tmp_path)
    after, trained, weights = accuracy(rounded(steps=0)), accuracy(rounded()), accuracy(rounded(steps=0, input_bits=16))
    assert accuracy(dense) == 1.0
    assert after < 0.5 and weights > 0.9  # the activations are what is lost
    assert trained >= 0.99


@pytest.mark.slow
def test_a_decoder_loses_by_its_activations(make_job: MakeJob, tmp_path: Path) -> None:
    dense = replace(Recover(**FITTED)(make_job()), records={})
    rounded = rounding(dense, tmp_path)

    found: dict[tuple[int, int], tuple[float, float]] = {}
    for steps in (0, 60):
        for bits in (4, 16):
            job = rounded(norm="global", steps=steps, input_bits=bits)
            apart = job.task.score(job.model, job.held).mean - dense.task.score(dense.model, dense.held).mean
            found[steps, bits] = math.exp(apart), from_dense(job)
    assert found[0, 4][0] > found[0, 16][0]  # ratios of perplexities
    for steps in (0, 60):  # trained, both may be better on held-out examples than a small dense model; but not nearer
        assert found[steps, 4][1] > 1.2 * found[steps, 16][1]
    assert found[60, 4][1] < found[0, 4][1]
