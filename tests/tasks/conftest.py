"""A tiny BERT without a head, and sentences whose label is the mood of one word among neutral ones: separable in
seconds.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.engines.onnx_runtime import ONNX
from compresso.engines.transformers import OWN
from compresso.engines.verify import verify
from compresso.job import Job
from compresso.tasks.base import Task
from compresso.tasks.classification import CLASSIFICATION

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MOODS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}
NEUTRAL = tuple(f"w{i}" for i in range(20))
VOCABULARY = (*SPECIAL, *MOODS["pos"], *MOODS["neg"], *NEUTRAL)
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **names)


def sentences(n: int, seed: int = 0) -> list[dict[str, str]]:
    """n rows, half of them of each mood."""
    draw = random.Random(seed)
    rows: list[dict[str, str]] = []
    for i in range(n):
        mood = ("pos", "neg")[i % 2]
        words = [draw.choice(NEUTRAL) for _ in range(draw.randint(2, 7))] + [draw.choice(MOODS[mood])]
        draw.shuffle(words)
        rows.append({"sentence": " ".join(words), "label": mood})
    return rows


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of labelled sentences."""
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sentences(240)))
    return path


MakeClassifier = Callable[..., Job]


def untrained(model: PreTrainedModel, rows: Sequence[Any], task: Task, out: Path, labels: tuple[str, ...] = ()) -> Job:
    """A job of a model with random weights large enough to tell units apart; the first six rows are held out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return Job(
        model=model,
        arch=arch_for(model.config),
        tokenizer=None,
        rows=rows[6:],
        held=rows[:6],
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=out,
        quiet=True,
        task=task,
        labels=labels,
    )


@pytest.fixture
def classifier(tmp_path: Path) -> MakeClassifier:
    """classifier(**config): a job of a classifier with random weights large enough to tell units apart."""

    def make(**config: object) -> Job:
        model = BertForSequenceClassification(BertConfig(**SIZES | config, num_labels=3)).eval()
        draw = random.Random(1)
        ids = [[2, *(draw.randrange(4, len(VOCABULARY)) for _ in range(draw.randint(2, 8))), 3] for _ in range(24)]
        rows = [{"input_ids": row, "labels": [i % 3]} for i, row in enumerate(ids)]
        return untrained(model, rows, CLASSIFICATION, tmp_path / "work", ("a", "b", "c"))

    return make


def exported(call: Call, pruned: Path, folder: Path) -> PreTrainedModel:
    """Write a checkpoint as ONNX and ask the engines of it and of the graph; the checkpoint's model."""
    code, out, error = call("export", pruned, "--format", "onnx", "--output", folder, "--json")
    assert code == 0, error
    told = json.loads(out)
    assert told["checked"] == "opened in ONNX Runtime" and told["difference"] < 1e-4
    answers = {one.engine: one for one in verify(pruned)}
    assert answers[ONNX.name].opens == "yes" and answers[OWN.name].opens == "yes"
    return load_model(open_source(pruned))
