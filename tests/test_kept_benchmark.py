"""`benchmarks/kept.py`: what a line says is done is not done again, whatever a script was stopped at."""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import kept  # pyright: ignore[reportMissingImports]

    yield kept
    for name in ("kept", "common"):
        sys.modules.pop(name, None)


CELLS = [(seed, name) for seed, name in product((0, 1), ("dense", "half"))]


@pytest.mark.parametrize("stopped_after", range(5))
def test_a_script_that_was_stopped_ends_in_the_same_lines(
    stopped_after: int, kept: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cells.jsonl"

    def do(most: int) -> None:
        for seed, name in kept.missing(file, ("seed", "cell"), CELLS):
            if len(kept.stored(file)) == most:
                return
            kept.keep(file, {"seed": seed, "cell": name, "right": "a long line", **kept.here()}, hidden=("right",))

    assert kept.stored(file) == []
    do(stopped_after)
    do(4)
    lines = kept.stored(file)
    assert [(line["seed"], line["cell"]) for line in lines] == CELLS
    assert all([*line] == ["seed", "cell", "right", "peak_mib", "machine"] for line in lines)
    assert all("load_before" not in line["machine"] and line["machine"]["versions"] for line in lines)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[*line] for line in shown] == [["seed", "cell", "peak_mib"]] * 4


def test_cells_that_a_line_is_kept_of_in_between_are_passed_over(kept: ModuleType, tmp_path: Path) -> None:
    """Two scripts at once do no cell twice, and a line that lacks a key has None there."""
    file = tmp_path / "cells.jsonl"
    cells = kept.missing(file, ("cell", "file"), [("dense", None), ("half", None), ("dense", "fp16"), ("half", "fp16")])
    assert next(cells) == ("dense", None)
    kept.keep(file, {"cell": "half"})
    kept.keep(file, {"cell": "dense", "file": "fp16"})
    assert list(cells) == [("half", "fp16")]


def test_a_glob_is_of_the_values_in_order(kept: ModuleType, tmp_path: Path) -> None:
    found = kept.missing(tmp_path / "none.jsonl", ("seed", "cell"), CELLS, "1-*")
    assert list(found) == [(1, "dense"), (1, "half")]


def test_the_scratch_folder_is_made_unless_the_table_alone_is_asked_for(
    kept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made" / "here"
    for more, there in ((["--report"], False), ([], True)):
        monkeypatch.setattr(sys, "argv", ["script", "--scratch", str(folder), *more])
        given = kept.asked(kept.options("What it does."))
        assert (given.scratch, given.threads, folder.is_dir()) == (folder, 1, there)
