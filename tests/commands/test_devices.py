"""Devices, pipes and huge files at the place of an output or an input: refused at once, not read, never replaced."""

import os
import resource
import stat
import time
from pathlib import Path

import pytest
from tests.conftest import Call

HUGE = 2**40
"""Bytes of a file with a hole."""


def pipe(path: Path) -> Path:
    """A named pipe, which nobody writes to: who opens it waits."""
    os.mkfifo(path)
    return path


def huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(HUGE)
    return path


@pytest.fixture(autouse=True)
def devices_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs these tests as root keeps the devices, also where they fail."""
    replace = Path.replace

    def guarded(path: Path, target: Path) -> Path:
        assert not str(target).startswith("/dev"), f"{target} would be replaced"
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", guarded)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "result.gguf").symlink_to("/dev/zero")
    return {
        "/dev/full": Path("/dev/full"),
        "/dev/zero": Path("/dev/zero"),
        "link": tmp_path / "link",
        "gguf link": tmp_path / "result.gguf",
        "pipe": pipe(tmp_path / "pipe"),
        "huge": huge(tmp_path / "huge"),
    }


@pytest.mark.parametrize("place", ["/dev/full", "/dev/zero", "link", "gguf link", "pipe", "huge"])
@pytest.mark.parametrize("command", ["compare", "evaluate", "measure", "run", "export", "export over"])
def test_an_output_that_is_no_file_of_ours_is_refused_unread(
    command: str, place: str, places: dict[str, Path], tiny_folder: Path, call: Call
) -> None:
    output = str(places[place])
    words = {
        "compare": ("compare", tiny_folder),
        "evaluate": ("evaluate", tiny_folder, "--corpus", "world"),
        "measure": ("measure", tiny_folder),
        "run": ("run", "magnitude/50", "--model", tiny_folder, "--overwrite"),
        "export": ("export", tiny_folder, "--format", "gguf"),
        "export over": ("export", tiny_folder, "--format", "gguf", "--overwrite"),
    }[command]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    mode = Path(output).stat().st_mode
    found, _, error = call(*words, "--output", output)
    assert found == 2 and len(error.splitlines()) == 1, error
    assert output in error or str(Path(output).resolve()) in error
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert Path(output).stat().st_mode == mode and stat.S_ISREG(mode) == (place == "huge")


@pytest.mark.parametrize("place", ["/dev/zero", "link", "pipe", "huge"])
@pytest.mark.parametrize("command", ["model", "data", "recipe", "corpus", "compare"])
def test_an_input_that_is_no_file_is_refused_unread(
    command: str, place: str, places: dict[str, Path], tiny_folder: Path, tmp_path: Path, call: Call
) -> None:
    given = places[place]
    if command == "data" and place != "/dev/zero":
        given = given.rename(tmp_path / "data.jsonl")
    words = {
        "model": ("inspect", given),
        "data": ("run", "wanda/50", "--model", tiny_folder, "--output", tmp_path / "out", "--data", given),
        "recipe": ("plan", given, "--model", tiny_folder),
        "corpus": ("evaluate", tiny_folder, "--corpus", given),
        "compare": ("compare", given, "--output", tmp_path / "page.html"),
    }[command]
    if (command, place) == ("data", "huge"):
        return  # lines are read one by one, and a line has a most: tested where they are read
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found, _, error = call(*words)
    assert found == 2 and len(error.splitlines()) == 1, error
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
