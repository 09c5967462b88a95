"""Fine-tuning makes the dense model of a task: a head where there is none, every weight trained, decay on matrices."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from compresso.job import Job
from compresso.methods import finetune
from compresso.methods.finetune import Finetune
from compresso.stage.tuning import tune
from compresso.tasks.classification import CLASSIFICATION
from compresso.training.groups import Group
from tests.tasks.conftest import SIZES, VOCABULARY, untrained


def base(tmp_path: Path) -> Job:
    """A bare encoder; which of two words a text has is its label."""
    rows = [{"input_ids": [2, 4 + i % 2, 10 + i % 7, 3], "labels": [i % 2]} for i in range(46)]
    return untrained(BertModel(BertConfig(**SIZES)).eval(), rows, CLASSIFICATION, tmp_path / "work", ("no", "yes"))


def test_a_bare_encoder_learns_under_a_new_head(tmp_path: Path) -> None:
    job = base(tmp_path)
    before = {name: weight.clone() for name, weight in job.model.state_dict().items()}
    job = Finetune(steps=60, batch=8, micro_batch=8, lr=3e-3, warmup=2)(job)
    assert isinstance(job.model, BertForSequenceClassification)
    assert job.model.config.id2label == {0: "no", 1: "yes"}
    assert CLASSIFICATION.score(job.model, job.held).accuracy == 1
    facts = job.records["finetune"]
    assert facts["new_head"] == ["no", "yes"] and facts["updates"] == 60
    assert facts["trainable"] == job.model.num_parameters()
    assert not any(parameter.requires_grad for parameter in job.model.parameters()) and not job.model.training
    layer = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(job.model.base_model.state_dict()[layer], before[layer])


def test_a_head_that_is_there_stays_and_the_dtype_comes_back(tmp_path: Path) -> None:
    job = Finetune(steps=1, batch=8, micro_batch=8)(base(tmp_path))
    head = job.model.get_parameter("classifier.weight").clone()
    job.model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    again = Finetune(steps=1, batch=8, micro_batch=8, lr=0.0)(replace(job, out=tmp_path / "again"))
    assert again.records["finetune"]["new_head"] is None
    assert again.model.dtype == torch.bfloat16
    assert torch.equal(again.model.get_parameter("classifier.weight"), head.to(torch.bfloat16))


def test_matrices_decay_and_nothing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Group] = []

    def watched(job: Job, name: str, trains: Any, objective: Any, groups: Sequence[Group], total: int) -> Any:
        seen.extend(groups)
        return tune(job, name, trains, objective, groups, total)

    monkeypatch.setattr(finetune, "tune", watched)
    model = Finetune(steps=1, batch=8, micro_batch=8, weight_decay=0.5)(base(tmp_path)).model
    assert sorted(map(id, model.parameters())) == sorted(id(one) for group in seen for one in group.params)
    for group in seen:
        matrices = {parameter.dim() > 1 for parameter in group.params}
        assert matrices == {group.weight_decay == 0.5} and group.weight_decay in (0.0, 0.5)
    assert len(VOCABULARY) == model.config.vocab_size
