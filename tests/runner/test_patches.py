"""Forward patches of a run: applied again by a resumed run and by `compresso.load`, with their tensors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.edit.shifting import shift, shifts_known
from transformers import AutoModelForCausalLM

import compresso
from compresso.edit.patches import TENSORS, unpatch_
from compresso.errors import Interrupted
from compresso.job import Job
from compresso.methods.magnitude import Magnitude
from compresso.methods.skip_in_prefill import SkipInPrefill
from compresso.runner.run import run

RECIPE: dict[str, Any] = {
    "name": "shifted",
    "data": {"prompt": False, "max_length": 64, "held": 4},
    "stages": [{"skip_in_prefill": {}}, {"magnitude": {"sparsity": 0.3}}],
}
IDS = torch.arange(3, 20).unsqueeze(0)


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Iterator[None]:
    """The stage `skip_in_prefill` shifts activations instead."""
    size = AutoModelForCausalLM.from_pretrained(tiny_folder).config.intermediate_size

    def stage(_: SkipInPrefill, job: Job) -> Job:
        patch = shift(size)
        patch.apply_(job.model)
        return replace(job, patches=(*job.patches, patch)).note("skip_in_prefill", skipped=[])

    monkeypatch.setattr(SkipInPrefill, "__call__", stage)
    with shifts_known():
        yield


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.usefixtures("shifted", "quick_reopening")
def test_a_resumed_run_and_load_apply_a_patch_with_its_tensors(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(output: Path, **how: Any) -> compresso.Result:
        return run(RECIPE, tiny_folder, instructions, output=output, quiet=True, **how)

    whole = go(tmp_path / "whole")
    plain = Magnitude.__call__

    def killed(*_: Any) -> Job:
        raise KeyboardInterrupt

    monkeypatch.setattr(Magnitude, "__call__", killed)
    with pytest.raises(Interrupted, match="continue from"):
        go(tmp_path / "cut")
    monkeypatch.setattr(Magnitude, "__call__", plain)
    monkeypatch.setattr(SkipInPrefill, "__call__", killed)  # its stage is finished
    resumed = go(tmp_path / "cut", resume=True)
    assert resumed.records["patches"] == whole.records["patches"]
    assert whole.records["patches"][0]["tensors"] == ["by"]
    assert torch.equal(logits(resumed.model), logits(whole.model))
    for name in ("whole", "cut"):
        assert (tmp_path / name / TENSORS).is_file()
        assert not (tmp_path / name / "tensors.safetensors").exists()
        loaded = compresso.load(tmp_path / name, dtype=torch.float32).model
        torch.testing.assert_close(logits(loaded), logits(whole.model), rtol=0, atol=1e-4)
        files = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert not torch.allclose(logits(files), logits(loaded), atol=1e-3)
        unpatch_(loaded)
        torch.testing.assert_close(logits(loaded), logits(files), rtol=0, atol=1e-4)
