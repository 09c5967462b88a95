"""Every command that opens a model folder refuses one that brings code: exit code 2, one line, and the code did not
run.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import SHORT, Call
from transformers import LlamaForCausalLM

from compresso.checkpoint import code
from compresso.engines.transformers import Transformers

COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "MODEL"),
    "inspect a config": ("inspect", "MODEL/config.json"),
    "plan": ("plan", "gate-taylor", "--model", "MODEL"),
    "run": ("run", "gate-taylor", "--model", "MODEL", "--data", "DATA", "--output", "OUT"),
    "evaluate": ("evaluate", "MODEL", "--corpus", "world"),
    "measure": ("measure", "MODEL", "--output", "OUT"),
    "measure beside another": ("measure", "GOOD", "MODEL"),
    "verify": ("verify", "MODEL"),
    "export": ("export", "MODEL", "--output", "OUT", "--format", "gguf"),
}


@pytest.fixture
def strange(tiny_folder: Path, tmp_path: Path) -> Path:
    """A good model with code that takes over `generate`, and a config that names code."""
    folder = tmp_path / "strange"
    shutil.copytree(tiny_folder, folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(model, **k): pass\n"
    )
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"custom_pipelines": {"x": "strange.X"},', 1)
    )
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stops_at_the_door(
    name: str, strange: Path, tiny_folder: Path, instructions: Path, tmp_path: Path, call: Call
) -> None:
    there = {"MODEL": str(strange), "GOOD": str(tiny_folder), "DATA": str(instructions), "OUT": str(tmp_path / "out")}
    arguments = [
        one.replace("MODEL", str(strange)) if one.startswith("MODEL/") else there.get(one, one)
        for one in COMMANDS[name]
    ]
    found, out, error = call(*arguments)
    assert (found, out) == (2, ""), error
    assert len(error.splitlines()) == 1, error
    assert "CheckpointError" in error and "no code of a model folder is run" in error
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strange"]


def test_compare_opens_no_model(strange: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads records alone, so that there is nothing to refuse, and nothing runs."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refuse)
    found, _, error = call("compare", strange, strange)
    assert found == 2 and "has no records.json" in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_run_passes_the_gate_each_time_it_reads_a_model(
    tiny_folder: Path,
    instructions: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    quick_reopening: None,
) -> None:
    """When it starts, when it reads the teacher of a distillation, and when it opens what it wrote."""
    seen: list[str] = []
    passed = code.refuse_code

    def noted(folder: Path, *more: Sequence[code.Shipped]) -> None:
        seen.append(folder.resolve().name)
        passed(folder, *more)

    for part in ("source", "tokenizer", "load"):
        monkeypatch.setattr(f"compresso.checkpoint.{part}.refuse_code", noted)
    short = (*SHORT, "stages.gate_taylor.batches=1", "stages.distill.batch=4", "stages.distill.lr_at_hidden=null")
    sets = [part for one in short for part in ("--set", one)]
    arguments = (
        "run",
        "gate-taylor/distill",
        "--model",
        tiny_folder,
        "--data",
        instructions,
        "--output",
        tmp_path / "out",
    )
    found, _, error = call(*arguments, "--max-steps", 1, "--allow-collapsed", *sets)
    assert found == 0, error
    model = seen.count(tiny_folder.resolve().name)
    assert model >= 4  # opened, its tokenizer, its weights, the teacher
    assert any(name != tiny_folder.resolve().name for name in seen)


def test_verify_refuses_before_any_engine_is_run(strange: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[object] = []
    monkeypatch.setattr(Transformers, "parity", lambda *arguments: run.append(arguments))
    assert call("verify", strange)[0] == 2
    assert not run
