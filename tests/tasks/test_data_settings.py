"""A task reads what it says it reads of a recipe's data, and what it does not read is refused, not passed over."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Call
from tests.tasks.conftest import SIZES, tokenizer
from transformers import BertConfig, LlamaConfig, ViTConfig

from compresso.core.picture import PixelInput
from compresso.data.pictures import png
from compresso.data.record_forms import records_from
from compresso.errors import RecipeError
from compresso.runner.data_knobs import DataKnobs
from compresso.runner.options import with_options
from compresso.runner.recipe import build, names, read
from compresso.runner.task_options import with_task
from compresso.tasks.base import DEFAULT, Reading, task_named, tasks

WORDS = " ".join(f"w{i}" for i in range(20))
SQUAD = {"question": "w1", "context": f"{WORDS} {WORDS}", "answers": {"text": ["w0"], "answer_start": [0]}}
RENAMED = {"on_inputs": "train_on_inputs"}


class Watched(Reading):
    """A reading that notes what is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            Reading.__getattribute__(self, "__dict__").setdefault("_asked", set()).add(RENAMED.get(name, name))
        return super().__getattribute__(name)


def rows_of(task: str) -> list[Any]:
    import torch

    picture = png(torch.zeros(3, 8, 8, dtype=torch.uint8))
    classes = [png(torch.full((1, 8, 8), i, dtype=torch.uint8)) for i in (0, 1)]
    return {
        "causal-lm": [{"text": WORDS}],
        "masked-lm": [{"text": WORDS}],
        "classification": [{"text": WORDS, "label": i % 2} for i in range(4)],
        "question-answering": [SQUAD],
        "image-classification": [{"image": {"bytes": picture}, "label": i % 2} for i in range(4)],
        "segmentation": [{"image": {"bytes": picture}, "label": {"bytes": classes[i % 2]}} for i in range(4)],
    }[task]


@pytest.mark.parametrize("name", tasks())
def test_a_task_names_the_settings_that_it_reads(name: str) -> None:
    task = task_named(name)
    config = {
        "causal-lm": LlamaConfig(vocab_size=64),
        "image-classification": ViTConfig(image_size=8, patch_size=4),
        "segmentation": ViTConfig(image_size=8, patch_size=4),
    }.get(name, BertConfig(**{**SIZES, "vocab_size": 64}))
    tokens = tokenizer()
    tokens.eos_token = "[SEP]"
    if name == "masked-lm":
        tokens.add_special_tokens({"mask_token": "[MASK]"})
    pixels = None if task.reads_text else PixelInput(8, 8, (0.5,) * 3, (0.5,) * 3)
    reading = Watched(32, pixels=pixels)
    task.encode(records_from(rows_of(name), "here", task.form), tokens, reading, config)
    known = {one.name for one in fields(DataKnobs)}
    assert set(task.data_settings) == vars(reading)["_asked"] & known


@pytest.mark.parametrize(
    ("task", "setting", "value"),
    [
        *((name, "prompt", "true") for name in tasks() if name != DEFAULT),
        *((name, "train_on_inputs", "true") for name in tasks() if name != DEFAULT),
        *((name, "pack", "true") for name in tasks() if name not in (DEFAULT, "masked-lm")),
        ("image-classification", "max_length", "64"),
        ("segmentation", "max_length", "64"),
    ],
)
def test_a_setting_that_the_task_does_not_read_is_refused(task: str, setting: str, value: str, bert: Path) -> None:
    one = f"data.{setting}={value}"
    said = (
        rf"--set {one}: task {task} does not read data\.{setting}; it reads data\.source, .*Leave data\.{setting} out"
    )
    with pytest.raises(RecipeError, match=said):
        with_options("qat/w4a4", model=str(bert), task=task, sets=[one])
    file = {"task": task, "data": {"train_on_inputs": True}, "stages": ["qat"]}
    with pytest.raises(RecipeError, match=rf"recipe recipe: data: train_on_inputs=True: task {task} does not read"):
        build(file)
    build({**file, "run": {}})  # the recipe of an earlier result holds everything


@pytest.mark.parametrize("task", [name for name in tasks() if name != DEFAULT])
def test_what_asks_for_nothing_is_taken_and_only_what_is_read_is_written(task: str, bert: Path) -> None:
    off = [f"data.{name}=false" for name in ("prompt", "pack", "train_on_inputs")]
    made = build(with_options("qat/w4a4", model=str(bert), task=task, sets=off))
    told = made.to_dict()
    assert set(told["data"]) == {"source", "held", *made.task.data_settings}
    assert build(told).to_dict() == told
    in_full = {**told, "data": asdict(DataKnobs())}  # type: ignore[call-overload]
    assert build(in_full).task is made.task


@pytest.mark.parametrize("task", tasks())
def test_recipes_that_ship_are_taken_by_every_task(task: str) -> None:
    for name in names():
        raw = with_task(read(name), task)
        try:
            build(raw, name)
        except RecipeError as error:
            assert "works on next tokens" in str(error), name


def test_settings_of_data_are_refused_where_a_recipe_reads_none(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"uses no data, but --set data\.limit=5 was given; leave it out"):
        with_options("rtn/4-bit", model=str(tiny_folder), sets=["data.limit=5"])


def test_data_that_is_no_mapping_is_refused_under_another_task(bert: Path) -> None:
    raw = {"data": "rows.jsonl", "stages": ["qat"]}
    with pytest.raises(RecipeError, match=r"data: knobs must be a mapping .*got 'rows.jsonl'"):
        build(with_options(raw, model=str(bert), task="classification"))


def test_inputs_of_plain_texts_are_learned_in_any_case_and_that_is_said(
    tiny_folder: Path, tmp_path: Path, call: Call
) -> None:
    rows = tmp_path / "texts.txt"
    rows.write_text("Once upon a time there was a fox.\n\n" * 80)
    asked = ("plan", "gate-taylor", "--model", tiny_folder, "--data", rows, "--set", "data.max_length=32")
    said = "data.train_on_inputs is of conversations; texts.txt holds none"
    assert said in " ".join(call(*asked, "--set", "data.train_on_inputs=true")[1].split())
    assert said not in " ".join(call(*asked)[1].split())
