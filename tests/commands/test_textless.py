"""Encoders, classifiers and models without a head, given to commands that read next tokens off logits: each is refused
in one line that says what the model is, before weights are read and anything is written.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import compresso
from compresso.commands import demo_real, evaluate, export, export_pictures, measure
from compresso.data import nano
from compresso.errors import ArchError, CompressoError
from compresso.runner import evaluate_task

ENCODER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT: dict[str, Any] = {**ENCODER, "vocab_size": 512, "max_position_embeddings": 64}
MADE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "headless": (lambda: BertModel(BertConfig(**BERT)), "(bert) is a model without a head"),
    "masked": (lambda: BertForMaskedLM(BertConfig(**BERT)), "(bert) is a model that fills gaps in text"),
    "moods": (lambda: BertForSequenceClassification(BertConfig(**BERT)), "(bert) is a classifier of texts"),
    "images": (
        lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=16, patch_size=4)),
        "(vit) is a classifier of images",
    ),
    "trunk": (
        lambda: LlamaModel(LlamaConfig(**ENCODER, vocab_size=512, max_position_embeddings=64)),
        "(llama) is a model without a head",
    ),
}
"""Models that write no text, and what each is called."""
EXPORTED = ("masked", "moods")
"""Those that ONNX Runtime can be asked about."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model with the tokenizer of the embedded one, so that nothing but its kind stands in the way."""
    parent, found = tmp_path_factory.mktemp("models"), dict[str, Path]()
    for name, (make, _) in MADE.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make().save_pretrained(parent / name)
        for file in nano.path().glob("*token*"):
            shutil.copy(file, parent / name)
        found[name] = parent / name
    return found


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for module, reads in (
        (evaluate, "load"),
        (evaluate_task, "load_model"),
        (measure, "load_model"),
        (measure, "peak_memory"),
        (demo_real, "load"),
        (export, "load_for"),
        (export_pictures, "load_for"),
    ):
        monkeypatch.setattr(module, reads, refuse)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "command",
    [
        ("evaluate",),
        ("evaluate", "--corpus", "TEXT"),
        ("evaluate", "--tasks", "world_fact", "--limit", "2"),
        ("evaluate", "--suite", "world"),
        ("measure", "--rounds", "1", "--batch", "1"),
        ("demo", "--output", "OUT", "--model"),
    ],
)
def test_what_writes_no_text_is_refused_before_any_work(
    call: Call, folders: dict[str, Path], tmp_path: Path, name: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "notes.txt").write_text("One line of text.\n" * 40)
    places = {"TEXT": tmp_path / "notes.txt", "OUT": tmp_path / "out"}
    verb, *options = (places.get(one, one) for one in command)
    given = (*options, folders[name]) if verb == "demo" else (folders[name], *options)
    code, out, error = call(verb, *given)
    assert (code, out, len(error.splitlines())) == (2, "", 1), error
    assert f"ArchError: {name} {MADE[name][1]};" in error
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_told_how_it_is_scored(folders: dict[str, Path], tmp_path: Path) -> None:
    """In Python in the words of Python; and that cure leads on."""
    with pytest.raises(ArchError, match=r"give task='classification' data='rows.jsonl' to score what it"):
        compresso.evaluate(folders["moods"], tasks=["world_fact"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (0, 1)))
    with pytest.raises(AssertionError, match="weights were read"):
        compresso.evaluate(folders["moods"], task="classification", data=str(rows))
    with pytest.raises(CompressoError, match="has no head for classification"):
        compresso.evaluate(folders["headless"], task="classification", data=str(rows))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_few_formats_take_encoders_and_only_with_a_head(
    folders: dict[str, Path], tmp_path: Path, name: str, format: str, overwrite: bool
) -> None:
    taken = format in ("onnx", "compressed-tensors")
    if (name in EXPORTED and taken) or (name == "images" and format == "onnx"):
        with pytest.raises(AssertionError, match="weights were read"):
            compresso.export(folders[name], tmp_path / "out", format=format, overwrite=overwrite)
        return
    with pytest.raises(ArchError) as caught:
        compresso.export(folders[name], tmp_path / "out", format=format, overwrite=overwrite)
    assert str(caught.value).startswith(f"{name} {MADE[name][1]}; format='{format}' takes causal language models")
    assert ("and encoders of texts" in str(caught.value)) == taken
    assert ("give format='onnx'" in str(caught.value)) == (name in EXPORTED)
    assert not (tmp_path / "out").exists()
