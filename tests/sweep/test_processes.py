"""Two processes that share out calibration data find what one finds.

Tolerance: float32 sums in another order, 1e-6 of the largest number of a tensor (1e-5 behind a solve). Zeros, orders
and counts are the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.sweep.shared_out import PARTS

from compresso.training.ranks import ALONE

ROOT = Path(__file__).parents[2]
SOLVED = {"of_bank": 1e-5, "repaired": 1e-5, "sliced": 1e-5}
"""Parts whose numbers are behind a solve."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [sys.executable, *command, str(ROOT / "tests" / "sweep" / "shared_out.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_two_processes_find_what_one_finds(two: Path, tmp_path: Path, part: str) -> None:
    wanted = PARTS[part](tmp_path, ALONE)
    first, second = (load_file(two / f"{part}.{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the two processes"
        if one.is_floating_point():
            assert torch.equal(first[name] == 0, one == 0), name
            atol = SOLVED.get(part, 1e-6) * float(one.abs().max())
            torch.testing.assert_close(
                first[name], one, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(first[name], one), name


@pytest.mark.slow
def test_what_stops_one_process_stops_both_with_the_same_words(two: Path) -> None:
    first, second = (json.loads((two / f"refusals.{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    overflow, statistic, learned = first
    assert overflow.startswith("NumericError: ")
    assert "statistic that does not add up over processes, and 2 were launched" in statistic
    assert "learns block by block in one process, and 2 were launched" in learned
