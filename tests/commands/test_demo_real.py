"""The demonstration on a chat model, with training and requests cut to almost nothing."""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Call

from compresso.commands import demo_real as module
from compresso.commands.demo_real import ASKED, RECIPES, demo_real
from compresso.data.requests import requests
from compresso.errors import CheckpointError

TEMPLATE = (
    "{% for m in messages %}{{ 'says' if m.role == 'assistant' else m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}says: {% endif %}"
)


@pytest.fixture
def chat(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_answers_two_results_a_page_and_a_gguf(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "requests", lambda: requests()[:24])
    monkeypatch.setattr(module, "_TOKENS", 8)
    output = tmp_path / "out"
    results = demo_real(chat, output, steps=1)
    assert tuple(results) == RECIPES
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert {line["instruction"] for line in lines} <= set(requests()[:24]) and not set(ASKED) & set(requests())
    for recipe in RECIPES:
        records = json.loads((output / recipe / "records.json").read_text())
        assert records["after"]["parameters"]["blocks"] < 0.85 * records["before"]["parameters"]["blocks"]
        assert records["data"]["source"].startswith("answers.jsonl")
    assert (output / "report.html").is_file() and (output / "compresso.gguf").read_bytes()[:4] == b"GGUF"
    out = capsys.readouterr().out
    assert all(asked in out for asked in ASKED) and "guard: " in out
    demo_real(chat, output, steps=1, overwrite=True)  # its own output may be replaced


def test_a_model_that_cannot_be_asked_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no chat template, so it cannot be asked; give a chat model"):
        demo_real(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_model(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, "demo_real", lambda model, output, **more: asked.append((model, output, more["keep"])))
    assert call("demo", "--model", "some.gguf", "--output", tmp_path / "out", "--keep", "0.9")[0] == 0
    assert asked == [("some.gguf", tmp_path / "out", 0.9)]


def test_requests_are_many_and_different() -> None:
    assert len(set(requests())) == len(requests()) == 180
