"""ZipLM on a classifier: candidates are judged by the classifier's own loss, and the result is a stock one that still
knows the labels.
"""

import json
from pathlib import Path

import pytest
import torch
from tests.tasks.conftest import sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compresso.runner.options import with_options
from compresso.runner.run import run

SETS = (
    *("stages.finetune.steps=60", "stages.finetune.lr=3.0e-3"),
    *("stages.ziplm.steps=6", "stages.ziplm.search.evaluations=20", "stages.ziplm.search.draws=10"),
)


@pytest.mark.slow
def test_a_classifier_of_narrower_ffns_still_knows_the_labels(bert: Path, moods: Path, tmp_path: Path) -> None:
    raw = with_options("ziplm/encoder", model=str(bert), task="classification", keep=0.75, sets=SETS)
    run(raw, bert, moods, output=tmp_path / "out", quiet=True)
    model, tokens = (
        one.from_pretrained(tmp_path / "out") for one in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert model.config.intermediate_size == 16 and model.config.num_attention_heads == 4
    told = json.loads((tmp_path / "out" / "records.json").read_text())["stages"]["ziplm"]
    assert 0 < told["loss"]["dense"] < 0.5 and told["loss"]["found"] < 0.5, "not a loss of next tokens"
    rows = sentences(40, seed=9)
    with torch.no_grad():
        logits = [model(**tokens(row["sentence"], return_tensors="pt")).logits[0] for row in rows]
    right = [model.config.id2label[int(one.argmax())] == row["label"] for one, row in zip(logits, rows, strict=True)]
    assert sum(right) >= 38
