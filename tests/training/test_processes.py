"""Several processes, and processes that die: the real thing, with a tiny LLaMA, LoRA, gates and multipliers."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Script = Callable[..., subprocess.CompletedProcess[str]]


def alone(tiny: ModuleType, noise: str, accumulation: int = 1, dropout: float = 0.0) -> dict[str, Tensor]:
    """What one process learns."""
    objective = tiny.Gated(noise, dropout)
    history = tiny.train(objective, 8, accumulation=accumulation)
    return tiny.trained(objective) | history.to_tensors()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and "log_alpha" in found and "loss/value" in found
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(found["log_alpha"] > 0, wanted["log_alpha"] > 0)


def test_the_tiny_objective_learns_everything(tiny: ModuleType):
    """The comparisons below would pass on an objective that does not move."""
    before, after = tiny.trained(tiny.Gated()), alone(tiny, "batch")
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def two(script: Script, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and messages of two processes that train three times: unsharded, unsharded with noise per example,
    sharded.
    """
    folder = tmp_path_factory.mktemp("two")
    ran = script(
        folder / "two",
        "batch",
        "example",
        "sharded",
        "--dropout",
        "0.2",
        "--folder",
        folder / "state/{run}",
        processes=2,
    )
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(
    tiny: ModuleType, two: tuple[Path, str], noise: str
):
    """Gate gradients are averaged over processes; noise, per example too, and dropout do not depend on the split."""
    folder, messages = two
    assert_same(load_file(folder / f"two.{noise}.safetensors"), alone(tiny, noise, accumulation=2, dropout=0.2))
    assert messages.count("8/8") == 3, "one process reports, for each of three runs"


@pytest.mark.slow
def test_sharded_processes_learn_the_same_and_resume(tiny: ModuleType, two: tuple[Path, str]):
    """FSDP 2: adapters and what they lie in are sharded; stopped by SIGTERM in both processes, and continued from whole
    tensors.
    """
    folder, messages = two
    assert_same(load_file(folder / "two.sharded.safetensors"), alone(tiny, "batch", accumulation=2, dropout=0.2))
    assert messages.count("stopped by SIGTERM; continue from") == 2 and "step-000006" in messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "code", "left"),
    [("kill", -signal.SIGKILL, ["step-000002", "step-000004"]), ("term", 143, ["step-000004", "step-000006"])],
)
def test_a_killed_process_is_continued_bit_for_bit(
    tiny: ModuleType, script: Script, tmp_path: Path, event: str, code: int, left: list[str]
):
    ran = script(
        tmp_path / "cut", "batch", "--dropout", "0.2", "--folder", tmp_path / "state", "--do", event, "--at", "4"
    )
    assert ran.returncode == code, ran.stderr
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == left
    assert "Traceback" not in ran.stderr and not (tmp_path / "cut.batch.safetensors").exists()
    resumed = tiny.Gated("batch", 0.2)
    history = tiny.train(resumed, 8, folder=tmp_path / "state")
    found, wanted = tiny.trained(resumed) | history.to_tensors(), alone(tiny, "batch", dropout=0.2)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
