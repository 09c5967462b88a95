"""What is refused of encoders and of choices names the value, what was wanted, and a cure that is there."""

import json
import re
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import compresso
from compresso.commands.export import FORMATS
from compresso.commands.plan_table import _length  # pyright: ignore[reportPrivateUsage]
from compresso.errors import ArchError, CheckpointError, ExportError, nearest
from compresso.tasks.base import DEFAULT, tasks
from tests.conftest import Call
from tests.tasks.test_masked_lm import masking_tokenizer, texts


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An encoder without a head."""
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_encoder_is_told_every_task_that_it_can_do_and_no_other(base: Path) -> None:
    with pytest.raises(ArchError) as caught:
        compresso.plan("qat/w4a4", base)
    said = str(caught.value)
    named = re.findall("task='([a-z-]+)'", said)
    assert named == ["classification", "masked-lm", "question-answering"] and "recipes train" not in said
    for task in named:
        compresso.plan("qat/w4a4", base, task=task)  # each is a cure
    for task in tasks().keys() - {*named, DEFAULT}:
        with pytest.raises(ArchError):
            compresso.plan("qat/w4a4", base, task=task)


def test_verify_wants_a_head_and_says_how_to_come_by_one(base: Path, call: Call) -> None:
    with pytest.raises(CheckpointError, match=r"^base \(bert\) has no head, .*Give the result of a run with task="):
        compresso.verify(base)
    code, _, error = call("verify", base / "config.json")
    assert code == 2 and "has no weights to verify. Give a folder of safetensors or a GGUF file." in error


def test_of_few_choices_a_poor_likeness_is_no_advice(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        compresso.export(base, tmp_path / "out", format="tflite")
    assert all(name in str(caught.value) for name in FORMATS) and "did you mean" not in str(caught.value)
    assert nearest("gguff", FORMATS) == "did you mean 'gguf'?"


@pytest.mark.parametrize("nested", [False, True])
def test_a_name_that_no_model_can_be_built_with_is_told_with_its_field(base: Path, nested: bool) -> None:
    file = base / "config.json"
    config = json.loads(file.read_text()) | {"hidden_act": "geluu"} | ({"more": {"act": "geluu"}} if nested else {})
    file.write_text(json.dumps(config))
    fields = "hidden_act and more.act are" if nested else "hidden_act is"
    with pytest.raises(CheckpointError, match=f"cannot be built: {fields} 'geluu', which is unknown. Check the config"):
        compresso.inspect(file)


def test_one_update_is_one_and_thousands_have_their_comma(base: Path, tmp_path: Path, call: Call) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(texts(90)))
    one = {"stage": "x", "duration": "28000", "updates": 1, "rounds": 1}
    assert _length(one, None) == "1 update, by max_steps, of 28,000"
    assert _length(one | {"duration": "1", "updates": 1}, None) == "1 update"
    assert _length(one | {"duration": "1000 + 200", "updates": 1200}, None) == "1,000 + 200 updates"
    masking_tokenizer().save_pretrained(base)
    given = ("--model", base, "--data", rows, "--max-steps", 1, "--set", "data.held=4")
    code, out, error = call("plan", "homodistil", *given, "--keep", 0.9)
    assert code == 0, error
    assert "homodistil: an epoch is 1 update of 4,096 rows; it takes 1 update\n" in out
