"""Runs of one-shot recipes, one a stage: what is written opens, records and card are true, a killed run goes on to the
same bytes.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call, Forked, work_of
from transformers import AutoModelForCausalLM

import compresso
from compresso.errors import CheckpointError
from compresso.methods import magnitude
from compresso.runner.options import with_options
from compresso.runner.run import Result, run
from compresso.training import progress

SETS = ["data.held=4", "data.pack=false", "data.limit=12"]
GROUPS = "stages.awq.group=16"  # the tiny model's widths are no multiples of 128


def done(recipe: str, folder: Path, data: Path, output: Path) -> Result:
    needs_data = not recipe.startswith("magnitude")
    raw = with_options(recipe, model=str(folder), sets=SETS if needs_data else [])
    return run(raw, folder, data if needs_data else None, output=output, quiet=True, allow_collapsed=True)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize(
    "recipe", ["magnitude/50", "wanda/2-4", "sparsegpt/50", "owl/70", "besa/50", "e-sparse/2-4", "svd/whitened"]
)
def test_every_recipe_ends_in_a_checkpoint_that_opens_with_its_zeros(
    recipe: str, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    result = done(recipe, tiny_folder, instructions, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    live = result.model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in opened.state_dict().items())
    (facts,) = result.records["stages"].values()
    found = {name: f"{int((live[name] == 0).sum())}/{live[name].numel()}" for name in facts["zeros"]}
    assert found == facts["zeros"]
    assert facts["changed"] == len(found)
    assert facts["meant_but_unchanged"] == []
    assert not [name for name in found if "proj" not in name]
    card = (result.folder / "README.md").read_text()
    assert "no smaller and no faster" in card
    assert "No tensor became smaller." in card
    assert "so it is smaller on disk" not in card


@pytest.mark.usefixtures("quick_reopening")
def test_a_stage_that_shows_no_steps_is_named_while_it_works(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever it is: one that reads weights alone has no pass that would say how far it is."""
    finished = magnitude.audit

    def slow(*given: Any) -> dict[str, Any]:
        time.sleep(0.5)
        return finished(*given)

    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    monkeypatch.setattr(magnitude, "audit", slow)
    raw = with_options("magnitude/50", model=str(tiny_folder), sets=[])
    run(raw, tiny_folder, output=tmp_path / "out", allow_collapsed=True)
    assert "magnitude  0:00:0" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_reopening")
def test_a_checkpoint_of_e_sparse_computes_the_same_gathered_and_is_n_of_m_then(
    tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    result = done("e-sparse/2-4", tiny_folder, instructions, tmp_path / "out")
    plain, gathered = compresso.load(result.folder).model, compresso.load(result.folder, gather=True).model
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(gathered(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    held = [
        [
            bool(((one.reshape(len(one), -1, 4) != 0).sum(dim=2) <= 2).all())
            for name, one in model.named_parameters()
            if "proj" in name
        ]
        for model in (plain, gathered)
    ]
    assert all(held[1]) and not all(held[0])
    with pytest.raises(CheckpointError, match=r"gather=True: .* has no orders to gather by"):
        compresso.load(tiny_folder, gather=True)


@pytest.mark.usefixtures("quick_reopening")
def test_rounded_activations_come_back_with_compresso_and_the_files_open_without(
    tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    result = done("smoothquant/w8a8", tiny_folder, instructions, tmp_path / "out")
    ids = torch.arange(3, 40).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    with torch.no_grad():
        live, loaded, unpatched = (
            model.eval()(input_ids=ids).logits for model in (result.model, compresso.load(result.folder).model, plain)
        )
    torch.testing.assert_close(loaded, live)
    assert 1e-4 < float((unpatched - live).abs().max()) < 0.1
    assert result.records["patches"][0].startswith("round_inputs token model.layers.0.self_attn.q_proj ")


@pytest.mark.usefixtures("quick_reopening")
def test_the_summary_says_what_zeros_are_worth(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, _ = call(
        "run", "magnitude/50", "--model", tiny_folder, "--output", tmp_path / "out", "--allow-collapsed"
    )
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("bytes")]
    assert line.endswith(
        "(100.0 %); 50.0 % zeros by magnitude, of the weights it worked on, stored dense: no smaller and no faster for"
        " it."
    )


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_read(
    call: Call, tiny_folder: Path, tmp_path: Path
) -> None:
    code, _, error = call(
        *(
            "run",
            "magnitude/50",
            "--model",
            tiny_folder,
            "--output",
            tmp_path / "out",
            "--set",
            "stages.magnitude.where.ignore=[lm_heda]",
        )
    )
    assert code == 2
    assert "ignore: 'lm_heda' matches no linear" in error
    assert not list(tmp_path.glob("out*"))


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(forked: Forked, tiny_folder: Path, instructions: Path) -> Command:
    """command(recipe, output, *more, event="", at=0): exit code and output of a run;
    the event comes after `at` blocks.
    """

    def _command(recipe: str, output: Path, *more: str, event: str = "", at: int = 0) -> tuple[int, str]:
        arguments = ["run", recipe, "--model", str(tiny_folder), "--data", str(instructions), "--output", str(output)]
        arguments += [part for one in SETS for part in ("--set", one)]
        return forked([*arguments, *more], event=event, phase=recipe.partition("/")[0].replace("-", "_"), at=at)

    return _command


def weights_hash(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sparsegpt/50", "awq/4-g128", "e-sparse/2-4", "besa/50-4bit", "svd/whitened"])
def test_killed_after_every_block_a_run_ends_in_the_same_bytes(recipe: str, command: Command, tmp_path: Path) -> None:
    """awq also changes norms, and e-sparse the order of channels, which blocks that are read from the journal must get
    back.
    """
    stage = recipe.partition("/")[0].replace("-", "_")
    more = ["--set", GROUPS] if stage == "awq" else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(recipe, whole, "--allow-collapsed", *more)[0] == 0
    for block in (1, 2, 3):
        resume = ["--resume"] if block > 1 else []
        assert command(recipe, killed, *resume, *more, event="kill", at=block)[0] == -9
        entries = sorted(path.name for path in (work_of(killed) / "training" / stage).iterdir())
        assert entries == [f"step-{i:06d}" for i in range(block)]
    damaged = work_of(killed) / "training" / stage / "step-000001" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    code, log = command(recipe, killed, "--resume", "--allow-collapsed", *more)
    assert code == 0, log
    assert "block 1 is done again" in log
    assert weights_hash(killed) == weights_hash(whole)
    one, other = (json.loads((output / "records.json").read_text())["stages"][stage] for output in (whole, killed))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
def test_resuming_with_other_knobs_or_data_is_refused(
    command: Command,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    assert command("wanda/50", output, event="kill", at=1)[0] == -9
    code, log = command("wanda/50", output, "--set", "stages.wanda.sparsity=0.6", "--resume")
    assert code == 2
    assert "recipe.stages.0.wanda.sparsity was 0.5, is 0.6" in log


@pytest.mark.slow
def test_sigterm_ends_after_the_block_and_says_how_to_go_on(
    command: Command,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    code, log = command("wanda/50", output, event="term", at=1)
    assert code == 143
    assert log.splitlines()[-1] == "stopped by SIGTERM; repeat the command with --resume to go on"
    assert (work_of(output) / "training" / "wanda" / "step-000000").is_dir()
    assert command("wanda/50", output, "--resume", "--allow-collapsed")[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize(
    ("behind", "knobs", "kept"),
    [("recover", {}, False), ("sparse_finetune", {}, True), ("gate_taylor", {"keep": 0.9}, True)],
)
def test_zeros_that_a_later_stage_fills_are_claimed_by_nobody(
    behind: str, knobs: dict[str, float], kept: bool, tiny_folder: Path, instructions: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trains = {} if behind == "gate_taylor" else {"steps": 2, "batch": 2, "micro_batch": 2, "lr": 1e-2}
    raw = {
        "name": "mine",
        "data": {"held": 4, "pack": False, "limit": 12},
        "stages": [{"magnitude": {"sparsity": 0.5}}, {behind: knobs | trains}],
    }
    result = run(raw, tiny_folder, instructions, output=tmp_path / "out", allow_collapsed=True)
    matrices = [one for name, one in result.model.named_parameters() if "_proj.weight" in name]
    zeros = sum(int((one == 0).sum()) for one in matrices) / sum(one.numel() for one in matrices)
    assert result.records["stages"][behind]["left"]["zeros"] == pytest.approx(zeros)
    assert (zeros > 0.4) == kept
    card = " ".join((result.folder / "README.md").read_text().split())
    told = f"of the weights that magnitude worked on {'are zeros' if kept else f'became zeros, which {behind} filled'}"
    assert told in card and ("zeros by magnitude" in card) == kept
    said = f"{behind} changed weights behind magnitude and filled its zeros"
    assert (said in caplog.text) == (not kept)
