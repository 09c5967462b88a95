"""ShortGPT-gen: the layers that turn the stream least are skipped,
the files stay dense, and `load` applies the patch.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import compresso
from compresso.edit.patches import unpatch_, written
from compresso.methods.skip_in_prefill import SkipInPrefill
from compresso.runner.run import run
from tests.methods.conftest import MakeJob

QUICK: dict[str, Any] = {"batches": 1, "batch": 4, "micro_batch": 4}


def test_a_layer_that_does_nothing_is_skipped_first(make_job: MakeJob) -> None:
    job = make_job()
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            job.model.get_parameter(f"model.layers.1.{part}.weight").zero_()
    ids = torch.tensor([job.rows[0]["input_ids"]])
    dense = job.model(input_ids=ids).logits
    after = SkipInPrefill(skip=0.34, **QUICK)(job)
    assert after.records["skip_in_prefill"]["skipped"] == [1]
    assert written(after.patches) == ["skip_in_prefill 1"]
    torch.testing.assert_close(after.model(input_ids=ids).logits, dense)


def test_a_small_share_skips_nothing(make_job: MakeJob) -> None:
    assert SkipInPrefill(skip=0.3, **QUICK)(make_job()).records["skip_in_prefill"]["skipped"] == []


def test_the_files_are_dense_and_load_applies_the_patch(
    tiny_folder: Path, instructions: Path, tmp_path: Path, quick_reopening: None
) -> None:
    recipe = {
        "name": "gen",
        "data": {"prompt": False, "max_length": 64, "held": 4},
        "stages": [{"skip_in_prefill": {"skip": 0.4, **QUICK}}],
    }
    result = run(recipe, tiny_folder, instructions, output=tmp_path / "out", quiet=True, allow_collapsed=True)
    assert result.records["patches"] == [
        "skip_in_prefill " + str(result.records["stages"]["skip_in_prefill"]["skipped"][0])
    ]
    ids = torch.arange(3, 20).unsqueeze(0)
    loaded = compresso.load(tmp_path / "out", dtype=torch.float32).model
    with torch.no_grad():
        patched = loaded(input_ids=ids).logits
        torch.testing.assert_close(result.model(input_ids=ids).logits, patched, rtol=0, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids).logits
        assert not torch.allclose(plain, patched, atol=1e-3)
        unpatch_(loaded)
        torch.testing.assert_close(loaded(input_ids=ids).logits, plain, rtol=0, atol=1e-4)
