"""A process that is forked in the place of one that is started answers as that one does, and knows as little."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils.hub import HF_MODULES_CACHE

from compresso.arch.base import arch_for
from compresso.engines import transformers_process
from compresso.engines.parity import reference_of
from compresso.engines.transformers import OWN, PLAIN, REMOTE
from compresso.formats.hf import reopen_and_compare, save_checkpoint
from tests import fresh
from tests.formats.nano_variants import nano_tokenizer, pruned_nano

LINE = "print('a line')"


def started() -> list[str]:
    """The programs that processes serve by now."""
    return [" ".join(one) for one in fresh._SERVED]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [["-m", "compresso.formats.reopen"], [transformers_process.__file__]], ids=["reopen", "open"]
)
def test_what_fails_fails_alike(program: list[str], tmp_path: Path) -> None:
    folder, ids, result = (str(tmp_path / name) for name in ("none", "ids", "out"))
    rest = [folder, ids, result, *(["float32", "cpu"] if program[0] == "-m" else [])]
    options = {"env": dict(os.environ), "capture_output": True, "text": True, "check": False}
    one, other = (how([sys.executable, "-P", *program, *rest], **options) for how in (fresh.run, fresh.REAL))  # type: ignore[operator]
    assert one.returncode == other.returncode == 1
    assert one.stderr.strip().splitlines()[-1] == other.stderr.strip().splitlines()[-1] != ""
    assert " ".join(["-P", *program]) in started()


@pytest.mark.slow
def test_a_checkpoint_opens_as_in_processes_of_their_own(tmp_path: Path) -> None:
    """The one that must not know compresso does not, and the code of a folder is copied to no shared place."""
    model, folder = pruned_nano(keep=0.7, attention=(3,), mlp=(2,)), tmp_path / "native"
    assert save_checkpoint(model, arch_for(model.config).shapes(model), folder, tokenizer=nano_tokenizer()) == "native"
    before = sorted(Path(HF_MODULES_CACHE).rglob("modeling_compresso.py"))
    reference = reference_of(model, torch.arange(3, 20))
    assert [one.parity(folder, reference).opens for one in (PLAIN, OWN, REMOTE)] == ["no", "yes", "yes"]
    assert sorted(Path(HF_MODULES_CACHE).rglob("modeling_compresso.py")) == before
    assert reopen_and_compare(folder, model, torch.arange(3, 20).unsqueeze(0), 1e-4) <= 1e-4
    assert len(started()) == 2


def test_any_other_command_is_a_process_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_forked", lambda *_: pytest.fail("it was forked"))
    assert subprocess.run is fresh.run
    done = subprocess.run([sys.executable, "-c", LINE], capture_output=True, text=True, check=True)
    assert done.stdout == "a line\n"
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=True)


def test_real_processes_can_be_asked_for(real_processes: None) -> None:
    assert subprocess.run is fresh.REAL
