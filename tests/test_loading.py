"""Opening a checkpoint with the prompt it was pruned with: what is trained is what is asked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import compresso
from compresso.data import nano
from compresso.data.instructions import opening_ids
from compresso.data.prompt import collaborative_prompt, full_prompt, prompt_identity
from compresso.errors import CheckpointError, DataError
from compresso.loading import Loaded
from compresso.runner.run import Result
from tests.conftest import Ran


@pytest.fixture(scope="module")
def prompted(ran: Ran) -> Result:
    """Pruned and recovered with the collaborative prompt before every instruction."""
    sets = ("data.prompt=true", "stages.gate_taylor.batches=1", "stages.gate_taylor.batch=4", "stages.recover.batch=4")
    return ran("gate-taylor", sets=sets, max_steps=1)


class Asked(Exception):
    """Carries the ids that generation was asked to continue."""


def asked(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, what: str, *words: str) -> list[int]:
    def generate(inputs: torch.Tensor, **_: object) -> None:
        raise Asked(inputs[0].tolist())

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model, "generate", generate)
        with pytest.raises(Asked) as found:
            getattr(loaded, what)(*words)
    return found.value.args[0]


@pytest.mark.slow
def test_ids_at_inference_start_with_bos_and_the_prompt(prompted: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = compresso.load(prompted.folder)
    assert loaded.tokenizer is not None
    assert loaded.prompt == collaborative_prompt(with_input=False)
    assert prompted.records["prompt"] == prompt_identity()
    ids = asked(loaded, monkeypatch, "generate", "Count to 3.")
    assert ids[0] == loaded.tokenizer.bos_token_id == 0
    assert ids[: len(opening_ids(loaded.tokenizer))] == opening_ids(loaded.tokenizer)
    assert loaded.tokenizer.decode(ids[1:]) == full_prompt("Count to 3.")
    with_input = asked(loaded, monkeypatch, "generate", "Add.", "1 2")
    assert loaded.tokenizer.decode(with_input[1:]) == full_prompt("Add.", "1 2")


@pytest.mark.slow
def test_the_chat_template_of_the_checkpoint_gives_the_same_ids(
    prompted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an engine that knows nothing of compresso asks the same."""
    tokenizer = AutoTokenizer.from_pretrained(prompted.folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count to 3."}], add_generation_prompt=True, return_dict=False
    )
    assert chat == asked(compresso.load(prompted.folder), monkeypatch, "generate", "Count to 3.")


@pytest.mark.slow
def test_without_prompt_ids_are_the_bare_body(ran: Ran, prompted: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compresso.load(ran("gate-taylor").folder)
    assert plain.prompt is None
    assert plain.tokenizer is not None
    ids = asked(plain, monkeypatch, "generate", "Count to 3.")
    assert plain.tokenizer.decode(ids[1:]) == full_prompt("Count to 3.", prompt_on=False)
    off = replace(compresso.load(prompted.folder), prompt=None)
    assert asked(off, monkeypatch, "generate", "Count to 3.") == ids


def test_completion_starts_with_bos_and_the_text(prompted: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = compresso.load(prompted.folder)
    assert loaded.tokenizer is not None
    text = "the cat"
    ids = asked(loaded, monkeypatch, "complete", text)
    assert ids == [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_prompt_that_this_version_does_not_know_is_refused(prompted: Result, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(prompted.folder, folder)
    records = json.loads((folder / "records.json").read_text())
    records["prompt"] = {"version": "v9", "sha256": "0" * 64, "sha256_with_input": "1" * 64}
    (folder / "records.json").write_text(json.dumps(records))
    with pytest.raises(CheckpointError, match=r"pruned with prompt v9 \(000000000000\).*use the compresso version"):
        compresso.load(folder)
    (folder / "records.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"records\.json"):
        compresso.load(folder)


def test_any_model_folder_opens(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = compresso.load(str(tiny_folder), dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, folder)
    bare = compresso.load(folder)
    assert bare.tokenizer is None
    for ask in (bare.generate, bare.complete):
        with pytest.raises(DataError, match="has no tokenizer"):
            ask("Count.")


def test_answers_are_text_without_special_tokens() -> None:
    loaded = compresso.load(nano.path())
    answer = loaded.generate("Count.", max_new_tokens=5)
    assert isinstance(answer, str)
    assert "<" not in answer
    assert loaded.complete("The", max_new_tokens=5) == loaded.complete(
        "The", max_new_tokens=5
    )  # greedy unless asked otherwise
