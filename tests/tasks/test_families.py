"""Every task on every family of encoders: a base model gets its head, learns, is pruned and written, and its ONNX graph
computes the same.
"""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.conftest import SIZES, sentences
from tests.tasks.test_masked_lm import MASK, masking_tokenizer, texts
from tests.tasks.test_question_answering import questions
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from compresso.arch.base import arch_for
from compresso.arch.context import positions_of
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.data.record_forms import records_from
from compresso.engines.encoder import encoder_parity, encoder_reference
from compresso.engines.onnx_runtime import ONNX
from compresso.formats.hf import save_checkpoint
from compresso.formats.onnx_encoder import save_onnx_encoder
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.finetune import Finetune
from compresso.methods.gate_taylor import GateTaylor
from compresso.tasks.base import Reading, task_named

WIDE = {**SIZES, "vocab_size": MASK + 1, "max_position_embeddings": 48}
FAMILIES: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**WIDE)),
    "roberta": lambda: RobertaModel(RobertaConfig(**WIDE, pad_token_id=0, bos_token_id=2, eos_token_id=3)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=MASK + 1,
            max_position_embeddings=48,
            pad_token_id=0,
        )
    ),
}
ROWS: dict[str, Any] = {
    "masked-lm": [{"text": text} for text in texts(40)],
    "classification": sentences(40),
    "question-answering": questions(40, words=(4, 8)),
}
LABELS = {"classification": ("neg", "pos")}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_made_trained_pruned_and_written(family: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, model = task_named(name), FAMILIES[family]().eval()
    model.config.architectures = [type(model).__name__]
    assert task.obstacle(model.config) == "" and task.lacks_head(model.config)
    records = records_from(ROWS[name], "here", task.form)
    length = positions_of(model.config)
    assert length == (47 if family == "roberta" else 48)  # RoBERTa's positions begin behind that of padding
    rows = task.encode(records, masking_tokenizer(), Reading(length), model.config).rows
    random.Random(0).shuffle(rows)
    job = Job(
        model=model,
        arch=arch_for(model.config),
        tokenizer=masking_tokenizer(),
        rows=rows[8:],
        held=rows[:8],
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=tmp_path / "work",
        quiet=True,
        task=task,
        labels=LABELS.get(name, ()),
    )
    job = Finetune(steps=3, batch=8, micro_batch=4)(job)
    dense = copy.deepcopy(job.model)
    job = GateTaylor(keep=0.8, batches=1, batch=8, kinds=("channel",), layout="uniform")(job)
    job = replace(job, out=tmp_path / "more", original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))
    job = Distill(steps=2, batch=4, micro_batch=2, train="all", intermediate_weight=1.0)(job)
    score = task.score(job.model, job.held)
    assert score.mean > 0
    shapes = job.arch.shapes(job.model)
    assert len({shape.channels for shape in shapes}) == 1 and 0 < shapes[0].channels < 48
    assert save_checkpoint(job.model, shapes, tmp_path / "out", tokenizer=job.tokenizer) == "uniform"
    opened = load_model(open_source(tmp_path / "out"))
    assert type(opened) is type(job.model) and not task.lacks_head(opened.config)
    assert task.score(opened, job.held).mean == pytest.approx(score.mean, rel=1e-5)


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_its_graph_computes_the_same(family: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    base = FAMILIES[family]().eval()
    model = task_named(name).with_head(base, LABELS.get(name, ()), 0).eval()
    model.config.architectures = [type(model).__name__]
    save_onnx_encoder(model, tmp_path / "onnx", masking_tokenizer())
    found = encoder_parity(ONNX, tmp_path / "onnx", encoder_reference(model, masking_tokenizer()))
    assert found.opens == "yes", found.reason
