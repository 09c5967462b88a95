"""What `qat` rounded is packed by what its records say, whatever the grid, and computes the same."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compresso.edit.patches import unpatch_
from compresso.errors import ExportError
from compresso.formats.packed import save_packed
from compresso.formats.packing import ROUNDING, packing_of
from compresso.job import Job
from compresso.methods.qat import Qat
from compresso.stage import cards, dumped
from tests.methods.conftest import MakeJob
from tests.methods.conftest import make_job as make_job  # a fixture

THERE = importlib.util.find_spec("compressed_tensors") is not None


def rounded(make_job: MakeJob, folder: Path, **knobs: Any) -> Job:
    """A job after rounding alone, and records as a run writes them."""
    stage = Qat(**{"steps": 0, **knobs})
    job = stage(make_job())
    recipe = {"stages": [{"qat": dumped(stage)}]}
    (folder / "records.json").write_text(json.dumps({"recipe": recipe, "stages": job.records}))
    return job


@pytest.mark.skipif(not THERE, reason="compressed-tensors: not installed")
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize(
    ("knobs", "bits", "format"),
    [
        ({}, 4, "pack-quantized"),
        ({"weight_bits": 1}, 2, "pack-quantized"),
        ({"weight_bits": 2}, 2, "pack-quantized"),
        ({"weight_bits": 8}, 8, "pack-quantized"),
        ({"quantisers": "deepspeed_compat"}, 4, "pack-quantized"),
        ({"weight_scale": "matrix"}, 4, "pack-quantized"),
        ({"weight_symmetric": False}, 4, "pack-quantized"),
        ({"weights_kept": 0.4}, 4, "pack-quantized"),
        ({"weight_bits": 8, "input_bits": 8}, 8, "int-quantized"),
        ({"weight_bits": 8, "input_bits": 8, "asymmetric": "all"}, 8, "pack-quantized"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_every_grid_is_packed(make_job: MakeJob, tmp_path: Path, knobs: dict[str, Any], bits: int, format: str) -> None:
    job = rounded(make_job, tmp_path, **knobs)
    packing = packing_of(tmp_path)
    assert (packing.bits, packing.group, packing.format) == (bits, 0, format) and len(packing.linears) == 21
    assert packing.simulated == (None if format == "int-quantized" else knobs.get("input_bits", 4))
    save_packed(job.model, packing, tmp_path / "packed")
    ids = torch.arange(3, 20).unsqueeze(0)
    patched = job.model(input_ids=ids).logits
    unpatch_(job.model)
    exact = job.model(input_ids=ids).logits
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()(input_ids=ids).logits
    if format == "pack-quantized":
        torch.testing.assert_close(opened, exact, rtol=0, atol=1e-5)
    else:  # the library's steps are 1/127.5 of the largest entry, ours 1/127
        assert 0 < float((opened - patched).abs().max()) < 2 * float((patched - exact).abs().max())
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in job.model.state_dict().values())
    assert sum(tensor.nbytes for tensor in stored.values()) < 0.8 * whole


def test_full_weights_are_not_packed(make_job: MakeJob, tmp_path: Path) -> None:
    rounded(make_job, tmp_path, weight_bits=16)
    with pytest.raises(ExportError, match="qat rounded no weights"):
        packing_of(tmp_path)


def test_the_stages_that_are_named_are_those_that_round() -> None:
    bits = {name: one.knobs.get("bits") for name, one in cards().items()}
    own = {"qat", "smoothquant"}
    always = [name for name, knob in bits.items() if name in own or (knob and knob.default is not None)]
    asked = [f"{name} with bits" for name, knob in bits.items() if knob and knob.default is None]
    assert ", ".join([*always, *asked]) == ROUNDING
