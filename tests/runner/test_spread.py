"""Whole runs in two processes that spread weights while they train (FSDP 2): they write what one process writes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import work_of
from tests.runner.launched import run
from tests.runner.test_processes import CHOSEN, GATES, LORA, ROOT, STEPS, tensors

WHOLE = {"steps": 3, **STEPS, "lr": 1e-4}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "gates then lora": [
        {"learn_gates": {**GATES, **LORA, "checkpointing": True}},
        {"recover": {"steps": 2, **LORA, "evaluations": 2}},
    ],
    "projected gates": [{"learn_gates": {**GATES, **LORA, "constraint": "projection", "cost_aware": True}}],
    "distilled whole": [CHOSEN, {"distill": {**WHOLE, "train": "all", "hard_weight": 0.5, "save_every": 1}}],
    "by tokens": [CHOSEN, {"token_distill": {**WHOLE, "evaluations": 3, "patience": 2}}],
    "from a cache": [CHOSEN, {"distill": {"steps": 2, **LORA, "teacher": "cached", "teacher_top": 8}}],
}
"""What shares a model out over processes while it trains."""


def launch(
    recipes: Mapping[str, Any], folder: Path, model: Path, data: Path, **asked: str
) -> subprocess.CompletedProcess[str]:
    """Run recipes in two processes, told of FSDP as `accelerate launch` tells them."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    told = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", **asked}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "tests/runner/launched.py"), str(folder), str(model), str(data), json.dumps(recipes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **told},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def two(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all recipes in two processes; "distilled whole" was killed after two updates and continued, and
    "distilled at once" is the same without that.
    """
    folder = tmp_path_factory.mktemp("two")
    killed = launch({"distilled whole killed": RECIPES["distilled whole"]}, folder, tiny_folder, instructions)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert [path.name for path in sorted(work_of(folder / "distilled whole").rglob("step-*"))] == [
        "step-000001",
        "step-000002",
    ]
    rest = {name: recipe for name, recipe in RECIPES.items() if name != "distilled whole"}
    again = {"distilled whole resumed": RECIPES["distilled whole"], "distilled at once": RECIPES["distilled whole"]}
    ran = launch(again | rest, folder, tiny_folder, instructions)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_processes_that_spread_weights_write_what_one_writes(
    name: str, two: Path, tmp_path: Path, tiny_folder: Path, instructions: Path, quick_reopening: None
) -> None:
    """Weights differ by 1e-5 at most, and shapes not at all."""
    run(name, RECIPES[name], tmp_path, str(tiny_folder), str(instructions))
    one, other = tmp_path / name, two / name
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert json.loads((one / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    wanted, found = (tensors(folder) for folder in (one, other))
    assert wanted.keys() == found.keys()
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5, msg=key)
    records = [json.loads((folder / "records.json").read_text())["stages"] for folder in (one, other)]
    assert records[0].keys() == records[1].keys()


@pytest.mark.slow
def test_a_killed_run_that_spreads_weights_goes_on_bit_for_bit(two: Path) -> None:
    resumed, at_once = (tensors(two / name) for name in ("distilled whole", "distilled at once"))
    assert resumed.keys() == at_once.keys() and all(torch.equal(resumed[key], one) for key, one in at_once.items())
