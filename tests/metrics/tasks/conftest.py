"""Made-up rows for every local file, and a tiny model with the embedded tokenizer; no network."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from compresso.data import nano
from compresso.metrics.tasks.copies import FOLDER

Rows = Sequence[dict[str, Any]]
STEMS = ("A lamp", "The grey door [title] and", "Two of  the ropes", 'She said "no" and', "Rain")
ENDINGS = ("runs.", "[step] sits.", "is  up.", "a")
OPTIONS = ("old", "new", "big", "it's")


def choices_of(n: int, letters: str = "ABCD") -> dict[str, list[str]]:
    return {"text": [f"thing {n} {letter}" for letter in letters], "label": list(letters)}


def story(n: int) -> dict[str, Any]:
    sentences = {f"input_sentence_{i}": f"{stem} {n}." for i, stem in enumerate(STEMS[:4], 1)}
    return {
        **sentences,
        "sentence_quiz1": "It ended well.",
        "sentence_quiz2": "It ended.",
        "answer_right_ending": n % 2 + 1,
    }


MADE_UP: dict[str, Rows] = {
    "piqa_validation": [
        {"goal": f"{stem} fix", "sol1": f"glue {stem}", "sol2": "use water", "label": n % 2}
        for n, stem in enumerate(STEMS)
    ],
    "hellaswag_validation_1000": [
        {"activity_label": "Mending", "ctx_a": s, "ctx_b": "then he", "ctx": "", "endings": list(ENDINGS), "label": "2"}
        for s in STEMS
    ],
    "winogrande_xl_validation": [
        {
            "sentence": f"{stem} hid from Ann because _ was late.",
            "option1": "Ann",
            "option2": "Bo",
            "answer": str(n % 2 + 1),
        }
        for n, stem in enumerate(STEMS)
    ],
    "arc_easy_test": [
        {"id": str(n), "question": f"{stem}?", "choices": choices_of(n), "answerKey": "C"}
        for n, stem in enumerate(STEMS)
    ],
    "arc_challenge_test": [
        {"id": str(n), "question": s, "choices": choices_of(n, "ABC"), "answerKey": "B"} for n, s in enumerate(STEMS)
    ],
    "openbookqa_test": [
        {"id": str(n), "question_stem": s, "choices": choices_of(n), "answerKey": "D"} for n, s in enumerate(STEMS)
    ],
    "storycloze_2018_validation": [story(n) for n in range(3)],
    "boolq_validation_2000": [
        {"question": f"is {s} red", "passage": f"{s} -- {s} is.", "label": n % 2} for n, s in enumerate(STEMS)
    ],
    "race_high_500": [
        {
            "example_id": "x",
            "article": f"{s}\nis 'old'.",
            "question": f"{s} is  _  .",
            "options": list(OPTIONS),
            "answer": "B",
        }
        for s in STEMS
    ],
    "lambada_openai_2000": [{"text": f"{stem} was red, and all of it was red"} for stem in STEMS],
    "mmlu_dev": [
        {"question": f"Shot {n} of {subject}? ", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": n % 4}
        for subject in ("anatomy", "virology")
        for n in range(5)
    ],
    "mmlu_test": [
        {"question": f"{stem}? ", "subject": subject, "choices": ["1", "2", "3", stem], "answer": n % 4}
        for n, stem in enumerate(STEMS)
        for subject in ("anatomy", "virology", "anatomy")
    ],
    "bbh": [
        {"task": task, "input": f"{s} is", "target": "True"}
        for s in STEMS
        for task in ("boolean_expressions", "navigate")
    ],
}


def write_rows(root: Path, name: str, rows: Rows) -> Path:
    path = root / FOLDER / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few rows in every file."""
    root = tmp_path_factory.mktemp("root")
    for name, rows in MADE_UP.items():
        write_rows(root, name, rows)
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No local files but those that a test names, and no network."""
    monkeypatch.delenv("COMPRESSO_DATA", raising=False)
    monkeypatch.setattr("compresso.metrics.tasks.ready.why_silent", lambda _: "HF_HUB_OFFLINE is set")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(nano.path())


NewModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="session")
def new_model(tokenizer: PreTrainedTokenizerBase) -> NewModel:
    """new_model(context=512): random weights with clear preferences."""

    def _new(context: int = 512) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LlamaForCausalLM(config).eval()

    return _new
