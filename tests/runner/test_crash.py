"""Whatever happens to a run, the old output stays until the new one is whole, and `--resume` ends in the same bytes."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SHORT, Call, Forked, work_of

import compresso.runner.output
from compresso.checkpoint.atomic import lock, write_json
from compresso.checkpoint.workfolder import WorkFolder
from compresso.errors import DataError, ExportError, NumericError
from compresso.runner.options import with_options
from compresso.runner.preflight import prepare
from compresso.runner.run import run

KNOBS = (
    *("tune=0", "ramp=0", "hold=6", "batch=4", "micro_batch=4", "score_batches=1", "save_every=2"),
    *("rank=2", "dropout=0.1"),  # dropout draws from torch's generator: a resume must restore that too
)
SETS = [
    *SHORT,
    *(f"stages.learn_gates.{knob}" for knob in KNOBS),
    "stages.recover.save_every=2",
    "stages.recover.batch=4",
]
Crash = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tiny_folder: Path, instructions: Path, forked: Forked) -> Crash:
    """command(output, *more, event="", phase="", at=0): exit code and output of a short `compresso run compresso` with
    an event in it.
    """

    def _command(output: Path, *more: str, event: str = "", phase: str = "", at: int = 0) -> tuple[int, str]:
        arguments = [
            "run",
            "compresso",
            "--model",
            str(tiny_folder),
            "--data",
            str(instructions),
            "--output",
            str(output),
        ]
        arguments += ["--max-steps", "6", *(part for one in SETS for part in ("--set", one))]
        return forked([*arguments, *more], event=event, phase=phase, at=at)

    return _command


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """Hash of the weights and curves of the run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    raw = with_options("compresso", model=str(tiny_folder), max_steps=6, sets=SETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compresso.runner.output, "reopen_and_compare", lambda *_, **__: 0.0)
        run(raw, tiny_folder, instructions, output=output, quiet=True)
    return outcome(output)


def outcome(output: Path) -> tuple[str, dict[str, Any]]:
    stages = json.loads((output / "records.json").read_text())["stages"]
    facts = {name: {key: value for key, value in stage.items() if key != "seconds"} for name, stage in stages.items()}
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(), facts


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_in_the_same_bytes(
    command: Crash, uninterrupted: tuple[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert command(output, event="kill", phase="hold", at=5)[0] == -9
    assert not output.exists()
    assert sorted(path.name for path in (work_of(output) / "training" / "learn_gates").iterdir()) == [
        "scores",
        "step-000002",
        "step-000004",
    ]

    assert command(output, "--resume", event="kill", phase="saved", at=1)[0] == -9  # between the stages
    stage = work_of(output) / "stages" / "01-learn_gates"
    written = (stage / "model.safetensors").stat().st_mtime_ns
    assert not (work_of(output) / "training" / "learn_gates").exists()

    code, log = command(output, "--resume", event="kill", phase="recover", at=3)
    assert code == -9, log
    assert "hold" not in log  # the finished stage is not repeated
    assert (stage / "model.safetensors").stat().st_mtime_ns == written
    assert command(output, "--resume", event="kill", phase="saved", at=2)[0] == -9
    assert not output.exists()

    code, log = command(output, "--resume")
    assert code == 0, log
    assert outcome(output) == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_exits_143(
    command: Crash, uninterrupted: tuple[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, log = command(output, event="term", phase="hold", at=3)
    assert code == 143
    assert log.splitlines()[-1] == "stopped by SIGTERM; repeat the command with --resume to go on"
    code, log = command(output, "--resume")
    assert code == 0, log
    assert outcome(output) == uninterrupted


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over_with_a_warning(
    command: Crash, uninterrupted: tuple[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command(output, event="kill", phase="hold", at=5)
    newest = work_of(output) / "training" / "learn_gates" / "step-000004" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    code, log = command(output, "--resume")
    assert code == 0, log
    assert "step-000004 is damaged" in log
    assert "using the checkpoint before it" in log
    assert outcome(output) == uninterrupted


@pytest.mark.slow
def test_a_damaged_stage_is_done_again(command: Crash, uninterrupted: tuple[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command(output, event="kill", phase="recover", at=3)
    stage = work_of(output) / "stages" / "01-learn_gates" / "model.safetensors"
    content = bytearray(stage.read_bytes())
    content[-5] ^= 1
    stage.write_bytes(content)
    code, log = command(output, "--resume")
    assert code == 0, log
    assert "stage 01-learn_gates is done again" in log
    assert outcome(output) == uninterrupted


@pytest.mark.slow
def test_resume_refuses_another_run_and_names_the_difference(
    command: Crash, call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command(output, event="kill", phase="hold", at=3)
    before = sorted((path, path.stat().st_mtime_ns) for path in work_of(output).rglob("*"))
    sets = [part for one in SETS for part in ("--set", one)]
    other = tmp_path / "other.jsonl"
    other.write_text(instructions.read_text().replace("Count", "Number"))

    def resumed(*more: object, data: Path = instructions) -> str:
        arguments = [
            "run",
            "compresso",
            "--model",
            tiny_folder,
            "--data",
            data,
            "--output",
            output,
            "--max-steps",
            6,
            *sets,
        ]
        code, _, error = call(*arguments, *more, "--resume")
        assert code == 2
        assert len(error.splitlines()) == 1
        return error

    assert "recipe.stages.0.learn_gates.mask_lr was 0.1, is 0.5" in resumed("--set", "stages.learn_gates.mask_lr=0.5")
    assert "seed was 0, is 1" in resumed("--seed", 1)
    error = resumed(data=other)
    assert "data was '" in error
    assert "recipe.data.source was 'rows.jsonl', is 'other.jsonl'" in error
    assert "layout was 'auto', is 'native'" in resumed("--layout", "native")
    assert "nothing to resume" in resumed("--output", tmp_path / "elsewhere")
    assert sorted((path, path.stat().st_mtime_ns) for path in work_of(output).rglob("*")) == before
    # and without --resume the work is not thrown away unasked
    code, _, error = call("run", "compresso", "--model", tiny_folder, "--data", instructions, "--output", output)
    assert code == 2
    assert "continue it with --resume or discard it with --overwrite" in error


def test_an_interrupted_run_is_looked_at_before_data_is_read(
    call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    sets = ["data.prompt=false", "data.limit=40"]
    raw = with_options("shortgpt", model=str(tiny_folder), sets=sets)
    given: dict[str, Any] = {"layout": "auto", "seed": 0, "device": "cpu", "overwrite": False, "skip_bad": False}
    known = prepare(raw, str(tiny_folder), str(instructions), output=output, **given).identity()
    (work_of(output) / "stages" / "01-drop_layers").mkdir(parents=True)
    write_json(work_of(output) / "identity.json", known)

    def read(*_: object, **__: object) -> None:
        raise DataError("data was read")

    monkeypatch.setattr("compresso.runner.preflight.read_examples", read)

    def said(*more: object) -> str:
        arguments = ["run", "shortgpt", "--model", tiny_folder, "--data", instructions, "--output", output]
        code, _, error = call(*arguments, *(part for one in sets for part in ("--set", one)), *more)
        assert code == 2 and len(error.splitlines()) == 1
        return error

    another = "ResumeError: cannot resume another run: "
    assert said("--resume", "--seed", 1).startswith(f"{another}seed was 0, is 1. Give the same arguments")
    assert said("--resume", "--set", "data.held=7").startswith(f"{another}recipe.data.held was ")
    assert "continue it with --resume or discard it with --overwrite" in said()
    for goes_on in ("--resume", "--overwrite"):
        assert said(goes_on) == "DataError: data was read\n"
    assert "nothing to resume" in said("--resume", "--output", tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "01-drop_layers",
        "identity.json",
        "out.partial",
        "stages",
    ]


@pytest.mark.slow
def test_a_nan_loss_exits_4_and_never_reaches_disk(command: Crash, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    output = tmp_path / "out"
    code, log = command(output, event="nan", phase="hold", at=2)
    assert code == 4, log
    assert "NumericError" in log.splitlines()[-1]
    assert not output.exists()
    saved = list(work_of(output).rglob("*.safetensors"))
    assert saved
    assert all(bool(tensor.isfinite().all()) for path in saved for tensor in load_file(path).values())


PRUNE_ONLY = {"name": "prune-only", "stages": [{"magnitude_structured": {"keep": 0.6}}]}


def old_output(tmp_path: Path) -> Path:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("old")
    return output


def earlier_run(tmp_path: Path) -> Path:
    """As much of a run's folder as says that a run wrote it."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "records.json").write_text('{"format": 1, "recipe": {}, "stages": {}}')
    (output / "README.md").write_text("old")
    return output


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = earlier_run(tmp_path)

    def differs(*_: object, **__: object) -> float:
        assert (output / "README.md").read_text() == "old"
        raise ExportError("reads back differently")

    with monkeypatch.context() as patch:
        patch.setattr(compresso.runner.output, "reopen_and_compare", differs)
        with pytest.raises(ExportError):
            run(PRUNE_ONLY, tiny_folder, output=output, overwrite=True, quiet=True)
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "records.json"]
    # the stage before the failure is there to be resumed; nothing else is left beside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    run(PRUNE_ONLY, tiny_folder, output=output, overwrite=True, resume=True, quiet=True)
    assert (output / "README.md").read_text() != "old"
    assert (output / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_failure_before_anything_was_done_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*_: object) -> None:
        raise NumericError("overflow")

    monkeypatch.setattr(sys.modules["compresso.runner.execution"], "check_finite", overflows)
    with pytest.raises(NumericError):
        run(PRUNE_ONLY, tiny_folder, output=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_occupied_outputs_are_refused(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(PRUNE_ONLY))
    output = old_output(tmp_path)
    code, _, error = call("run", recipe, "--model", tiny_folder, "--output", output)
    assert code == 2
    assert "exists and is not empty" in error
    code, _, error = call("run", recipe, "--model", tiny_folder, "--output", output, "--resume")
    assert code == 2  # before the work, not after it
    assert "exists and is not empty" in error
    with lock(WorkFolder.beside(tmp_path / "busy")):
        code, _, error = call("run", recipe, "--model", tiny_folder, "--output", tmp_path / "busy")
    assert code == 2
    assert "another process is writing" in error
    (tmp_path / "free.partial").mkdir()
    (tmp_path / "free.partial" / "thesis.tex").write_text("mine")
    code, _, error = call("run", recipe, "--model", tiny_folder, "--output", tmp_path / "free", "--overwrite")
    assert code == 2
    assert "no run made it" in error
    assert (tmp_path / "free.partial" / "thesis.tex").read_text() == "mine"


def test_input_folders_are_never_outputs(call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(PRUNE_ONLY))
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "link", tmp_path):
        code, _, error = call("run", recipe, "--model", model, "--output", output, "--overwrite")
        assert code == 2
        assert "the input model" in error or "the folder of the input model" in error
    model.rename(tmp_path / "out.partial")  # where a run would keep its work
    code, _, error = call(
        "run", recipe, "--model", tmp_path / "out.partial", "--output", tmp_path / "out", "--overwrite"
    )
    assert code == 2
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    shutil.copy(instructions, earlier_run(tmp_path))
    code, _, error = call(
        "run",
        "gate-taylor",
        "--model",
        tiny_folder,
        "--data",
        tmp_path / "out" / "rows.jsonl",
        "--output",
        tmp_path / "out",
        "--overwrite",
    )
    assert code == 2
    assert "which the run replaces" in error


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_an_interrupted_final_evaluation_says_how_to_go_on(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(PRUNE_ONLY))
    command = ("run", recipe, "--model", tiny_folder, "--output", tmp_path / "out", "--no-verify", "--allow-collapsed")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compresso.runner.execution"], "take", interrupted)
        code, _, error = call(*command)
    assert code == 130
    assert error.splitlines()[-1] == "stopped by SIGINT; repeat the command with --resume to go on"
    assert call(*command, "--resume")[0] == 0
    assert (tmp_path / "out" / "records.json").is_file()
