"""Whole runs in two processes: what they learn is what one learns, it is written once, and a killed one goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import work_of
from tests.runner.launched import run

ROOT = Path(__file__).parents[2]
STEPS = {"batch": 8, "micro_batch": 4}
LORA = {**STEPS, "rank": 2, "alpha": 4, "lr": 1e-3}
LOOKS = {"batches": 3, "batch": 4, "micro_batch": 4}
WANDA = {"wanda": {"sparsity": 0.5, "calibration": {"examples": 12, "batch": 4}}}
GATES = {"keep": 0.7, "kinds": ["head", "channel"], "tune": 1, "ramp": 2, "hold": 1, "score_batches": 1}
CHOSEN = {"gate_taylor": {"keep": 0.8, "kinds": ["channel"], "layout": "uniform", **LOOKS}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "gates then lora": [{"learn_gates": {**GATES, **LORA}}, {"recover": {"steps": 2, **LORA}}],
    "distilled whole": [CHOSEN, {"distill": {"steps": 3, **STEPS, "lr": 1e-4, "train": "all"}}],
    "distilled from a cache": [
        CHOSEN,
        {"distill": {"steps": 3, **LORA, "teacher": "cached", "teacher_top": 8}},
    ],
    "repaired": [CHOSEN, {"repair": {"examples": 24, "batch": 4}}],
    "zeroed": [WANDA],
    "zeroed offloaded": [WANDA],
}
Launch = Callable[[dict[str, Any], Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch(tiny_folder: Path, instructions: Path) -> Launch:
    """Run recipes in two processes."""

    def of(recipes: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        given = [ROOT / "tests" / "runner" / "launched.py", folder, tiny_folder, instructions, json.dumps(recipes)]
        return subprocess.run(
            [*command, *map(str, given)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return of


@pytest.fixture(scope="module")
def two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all recipes in two processes, the last of which was killed and continued."""
    folder = tmp_path_factory.mktemp("two")
    killed = launch({"zeroed killed": RECIPES["zeroed"]}, folder)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    work = work_of(folder / "zeroed")
    assert len(list(work.rglob("step-*"))) == 2, "two of three blocks are finished"
    rest = {name: recipe for name, recipe in RECIPES.items() if name != "zeroed"}
    ran = launch({"zeroed resumed": RECIPES["zeroed"], **rest}, folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint in one file or several."""
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_write_what_one_writes(
    name: str, two: Path, tmp_path: Path, tiny_folder: Path, instructions: Path, quick_reopening: None
) -> None:
    """Weights that are trained differ by 1e-5 at most, those that are chosen or zeroed not at all."""
    run(name, RECIPES[name], tmp_path, str(tiny_folder), str(instructions))
    one, other = tmp_path / name, two / name
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert not work_of(other).exists(), "what was kept on the way is gone"
    assert json.loads((one / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    wanted, found = (tensors(folder) for folder in (one, other))
    assert wanted.keys() == found.keys()
    for key, weight in wanted.items():
        assert torch.equal(found[key] == 0, weight == 0), key
        torch.testing.assert_close(found[key], weight, rtol=0, atol=0 if name.startswith("zeroed") else 1e-5, msg=key)
    dense = tensors(tiny_folder)
    assert any(
        weight.shape != dense[key].shape or not torch.equal(weight, dense[key]) for key, weight in wanted.items()
    )
