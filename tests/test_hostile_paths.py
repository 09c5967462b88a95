"""Every option that takes a path, given one that leads nowhere: one line, exit code 2 or 3, nothing left behind."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compresso.checkpoint import load, source, tokenizer
from compresso.data import nano
from tests.conftest import Call

HOSTILE = {
    "long": "x" * 300,
    "deep": "/".join(["y" * 200] * 30),
    "a link to itself": "loop",
    "below a link to itself": "loop/x",
    "two links to each other": "a/b",
    "not UTF-8": os.fsdecode(b"n\xff\xfe"),
    "below what is not UTF-8": os.fsdecode(b"n\xff\xfe/x"),
    "home of nobody": "~nobody-at-all/x",
    "below a file": "file/x",
    "below a device": "/dev/null/x",
    "a device": "/dev/null",
    "a full device": "/dev/full",
    "below a process": "/proc/self/fd/x/y",
}
MODEL = str(nano.path())
COMMANDS = {
    "inspect": ("inspect", "{}"),
    "plan a model": ("plan", "magnitude/50", "--model", "{}"),
    "plan a recipe": ("plan", "{}", "--model", MODEL),
    "run a model": ("run", "magnitude/50", "--model", "{}", "--output", "out"),
    "run into": ("run", "magnitude/50", "--model", MODEL, "--output", "{}"),
    "run on": ("run", "wanda/50", "--model", MODEL, "--data", "{}", "--output", "out"),
    "evaluate": ("evaluate", "{}"),
    "evaluate on": ("evaluate", MODEL, "--corpus", "{}"),
    "evaluate into": ("evaluate", MODEL, "--corpus", "file", "--output", "{}"),
    "evaluate with": ("evaluate", MODEL, "--tasks", "piqa", "--data-root", "{}"),
    "measure": ("measure", "{}"),
    "measure into": ("measure", MODEL, "--no-memory", "--output", "{}"),
    "compare": ("compare", "{}"),
    "compare into": ("compare", "file", "--output", "{}"),
    "export": ("export", "{}", "--format", "vllm-deci", "--output", "out"),
    "export into": ("export", MODEL, "--format", "vllm-deci", "--output", "{}"),
    "export a file into": ("export", MODEL, "--format", "gguf", "--output", "{}"),
    "verify": ("verify", "{}"),
    "recipes": ("recipes", "{}"),
    "methods": ("methods", "{}"),
    "demo": ("demo", "--output", "{}"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "file").write_text("a text\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file", "loop"]


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_leads_nowhere_is_said_in_a_line(command: str, path: str, here: Path, call: Call) -> None:
    code, out, error = call(*(word.replace("{}", HOSTILE[path]) for word in COMMANDS[command]))
    assert code in (2, 3), error
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error + out
    assert len(error) < 1500


@pytest.mark.parametrize("command", COMMANDS)
def test_a_working_folder_that_is_gone_is_said_in_a_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, _, error = call(*(word.replace("{}", "relative/x") for word in COMMANDS[command]))
    assert code in (2, 3), error
    assert len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize(
    "command",
    [
        ("run", "magnitude/50", "--model", "model", "--output", "out", "--no-verify"),
        ("evaluate", "model", "--corpus", "file", "--protocol", "compresso"),
        ("export", "model", "--format", "vllm-deci", "--output", "out"),
        ("measure", "model", "--no-memory", "--rounds", "1", "--batch", "1"),
    ],
)
def test_a_model_that_vanishes_while_it_is_read(
    command: tuple[str, ...], when: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Its folder goes before the nth look at its files."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "file").write_text("One text of some words. " * 400)
    monkeypatch.chdir(tmp_path)
    looks, look = [0], source.refuse_code

    def vanishing(folder: Path) -> None:
        if looks[0] == when:
            shutil.rmtree(tmp_path / "model")
        looks[0] += 1
        look(folder)

    for reader in (source, tokenizer, load):
        monkeypatch.setattr(reader, "refuse_code", vanishing)
    code, out, error = call(*command)
    assert "Traceback" not in error + out
    if looks[0] > when:
        assert code == 2, error
        assert error.splitlines()[-1].startswith(("CheckpointError: ", "ResumeError: ")), error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
