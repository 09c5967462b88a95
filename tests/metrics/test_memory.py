"""Peak memory: one measurement in a real process, and what is said when such a process dies."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.errors import CheckpointError, CompressoError, ResourceError
from compresso.metrics import memory
from compresso.metrics.memory import peak_memory, peak_resident


@pytest.mark.slow
def test_a_process_of_its_own_holds_the_weights_and_nothing_of_ours(tmp_path: Path) -> None:
    """64 MB of weights count at least once and not many times; 512 MB that this process has held before do not count at
    all.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 250_000,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).float()
    weights = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    ours = torch.ones(128_000_000)
    found = peak_memory(tmp_path, batch=1, prompt_tokens=4, new_tokens=2)
    assert weights < found.value < 4 * weights < ours.numel() * 4
    assert (found.name, found.unit, found.how) == ("memory/peak", "bytes", "measured")
    assert found.environment.dtype == "float32"
    assert (found.protocol["batch"], found.protocol["prompt_tokens"], found.protocol["new_tokens"]) == (1, 4, 2)


@pytest.mark.parametrize(
    ("code", "last", "kind", "message"),
    [
        (
            -signal.SIGKILL,
            "",
            ResourceError,
            "ended by signal 9, as the system does when memory runs out; free memory, ",
        ),
        (128 + signal.SIGKILL, "Killed", ResourceError, "ended by signal 9"),
        (-signal.SIGSEGV, "", ResourceError, "ended by signal 11; free memory"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", ResourceError, "does not fit into memory while it runs"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: 7 bytes", ResourceError, "--no-memory"),
        (
            3,
            "ResourceError: model m does not fit into memory of cpu",
            ResourceError,
            "^model m does not fit into memory of cpu$",
        ),
        (2, "CheckpointError: m lacks weights: all", CheckpointError, "^m lacks weights: all$"),
        (
            1,
            "ZeroDivisionError: division by zero",
            CheckpointError,
            "could not be run in a process of its own: ZeroDivisionError",
        ),
    ],
)
def test_a_process_that_dies_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, code: int, last: str, kind: type[CompressoError], message: str
) -> None:
    def dead(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, "", f"some warning\n{last}\n")

    monkeypatch.setattr(memory.subprocess, "run", dead)
    with pytest.raises(kind, match=message):
        peak_memory("somewhere/model")


def test_the_process_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = {"folder": str(tmp_path), "result": str(tmp_path / "peak.json"), "device": "cpu", "dtype": None}
    order |= {"batch": 1, "prompt_tokens": 4, "new_tokens": 2, "seed": 0, "threads": torch.get_num_threads()}
    assert memory._main(json.dumps(order)) == 2
    assert capsys.readouterr().err.startswith(f"CheckpointError: {tmp_path} has no config.json")
    assert not (tmp_path / "peak.json").exists()


def test_the_peak_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_resident()
    block = torch.ones(32_000_000)
    during = peak_resident()
    del block
    assert during >= before
    assert peak_resident() >= during
    monkeypatch.setattr(memory, "_system_peak", lambda: during - 4096)  # as Linux may say, by pages it counts late
    assert peak_resident() >= during
