"""`compresso evaluate --task`: what becomes of the data on the way to a number is said, as a run says it, and stands
beside the number.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.conftest import SIZES, sentences, tokenizer
from transformers import BertConfig, BertForSequenceClassification

from compresso.checkpoint.source import Source, open_source
from compresso.errors import DataError
from compresso.metrics.record import Measurement
from compresso.runner.evaluate_task import task_metric

LONG = " ".join(["good"] * 40)
"""More words than the model has positions."""


@pytest.fixture
def classifier(tmp_path: Path) -> Source:
    """A classifier whose records say that it learned from sentences."""
    torch.manual_seed(0)
    names = {0: "neg", 1: "pos"}
    config = BertConfig(**SIZES, id2label=names, label2id={name: i for i, name in names.items()})
    folder = tmp_path / "moody"
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "records.json").write_text(json.dumps({"data": {"columns": {"sentence": 9, "label": 9}}}))
    return open_source(folder)


def scored(source: Source, folder: Path, rows: list[dict[str, Any]], limit: int | None = None) -> Measurement:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task_metric(source, "classification", path, torch.device("cpu"), limit)[0]


def test_texts_that_are_cut_are_counted_and_said(
    classifier: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = scored(classifier, tmp_path, [*sentences(6), *({"sentence": LONG, "label": "pos"} for _ in range(3))])
    assert found.protocol["max_length"] == 32 and found.protocol["cut_examples"] == 3
    assert caplog.text.count("3 examples are cut at 32 tokens") == 1


def test_columns_other_than_those_learned_from_are_said(
    classifier: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [
        {"sentence1": row["sentence"], "sentence2": "w1", "label": row["label"], "note": "x"} for row in sentences(4)
    ]
    with caplog.at_level(logging.WARNING):
        scored(classifier, tmp_path, pairs)
    assert "the columns read are sentence1, sentence2, label, and moody was made with sentence, label" in caplog.text
    assert "columns passed over: note (4 rows)" in caplog.text


def test_nothing_is_said_where_nothing_was_lost(
    classifier: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert scored(classifier, tmp_path, sentences(4)[:]).protocol["cut_examples"] == 0
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        scored(classifier, tmp_path, sentences(4), limit=2)
    assert "2 of 4 records are looked at (--limit)" in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"sentence": "w1", "label": "joy"},
            "rows.jsonl:3: label 'joy' is none of .*; relabel the rows, or leave them out$",
        ),
        (
            {"sentence": "w1", "label": -1},
            "rows.jsonl:3: field 'label' is -1, .* can neither be learned from nor scored",
        ),
    ],
)
def test_what_cannot_be_scored_is_named_with_a_cure_of_scoring(
    row: dict[str, Any], said: str, classifier: Source, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        scored(classifier, tmp_path, [*sentences(2), row])


def test_a_model_that_reads_too_little_is_not_to_be_cured_by_a_setting_of_runs(tmp_path: Path) -> None:
    config = BertConfig(**{**SIZES, "max_position_embeddings": 3}, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "short")
    tokenizer().save_pretrained(tmp_path / "short")
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": i % 2} for i in range(4)]
    with pytest.raises(DataError, match="the model reads no more than 3 tokens: give one that reads more"):
        scored(open_source(tmp_path / "short"), tmp_path, rows)
