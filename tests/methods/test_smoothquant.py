"""SmoothQuant on whole models: exact before rounding, outliers cost less,
activations rounded by a patch, in no file.
"""

from typing import Any

import pytest
import torch

from compresso.core.rounding import fit
from compresso.edit.patches import unpatch_, written
from compresso.edit.round_inputs import PATCH, RANGES, round_inputs_, rounded
from compresso.methods.smoothquant import SmoothQuant
from compresso.observe.folds import Stats
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob
from tests.methods.test_awq import lost, outlying


def test_smoothed_and_not_rounded_the_model_computes_what_it_did(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmoothQuant, "_round", lambda self, name, weight, seen, scale: weight)
    dense, job = outlying(make_job()), SmoothQuant()(outlying(make_job(folder="smooth")))
    unpatch_(job.model)
    assert lost(dense, job) < 1e-6
    scales = job.records["smoothquant"]["largest_scale"]
    assert set(scales) == {f"model.layers.{i}.{part}" for i in range(3) for part in PARTS}


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize("knobs", [{}, {"inputs": "tensor"}, {"weights": "matrix"}])
def test_outliers_cost_a_fifth_of_what_they_cost_plain_rounding(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    """Plain: alpha 0 on weights that are all alike scales hardly, so both are rounded as they are."""
    dense = outlying(make_job())
    naive = outlying(make_job())
    names = [name for name, _ in naive.model.named_modules() if name.endswith("_proj")]
    with torch.no_grad():
        for name in names:
            weight = naive.model.get_parameter(f"{name}.weight")
            rows = weight if knobs.get("weights") != "matrix" else weight.reshape(1, -1)
            weight.copy_(fit(rows, 8, symmetric=True).round(rows).reshape(weight.shape))
    round_inputs_(naive.model, knobs.get("inputs", "token"), names)
    job = SmoothQuant(**knobs)(outlying(make_job(folder="smooth")))
    assert lost(dense, job) < lost(dense, naive) / 5
    assert [patch.split()[:2] for patch in written(job.patches)] == [[PATCH, knobs.get("inputs", "token")]]


def test_only_what_was_chosen_is_rounded(make_job: MakeJob) -> None:
    dense = make_job().model.state_dict()
    job = SmoothQuant(where=Where(layers=(1, 2), modules=("*.mlp.*",)))(make_job())
    changed = {name for name, tensor in job.model.state_dict().items() if not torch.equal(tensor, dense[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {
        "model.layers.1.post_attention_layernorm.weight"
    }
    assert written(job.patches)[0].split()[2:] == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.mark.parametrize("weights", ["row", "matrix"])
def test_the_largest_weight_is_a_point_of_its_grid(make_job: MakeJob, weights: str) -> None:
    """Steps of the largest over 127, as products of signed integers have them: it stays, and the others are whole
    steps.
    """
    stage = SmoothQuant(weights=weights)  # type: ignore[arg-type]
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = stage._round("", weight, Stats(weight, 1), torch.ones(32))
    rows, before = (one if weights == "row" else one.reshape(1, -1) for one in (found, weight))
    top = before.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(rows.abs().amax(dim=1, keepdim=True), top)
    steps = rows / (top / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert float((rows - before).abs().max()) <= float(top.max()) / 127 / 2 * 1.001


@pytest.mark.parametrize("share", RANGES)
def test_activations_are_rounded_in_the_same_steps(share: str) -> None:
    inputs = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    top = inputs.abs().amax(dim=-1, keepdim=True) if share == "token" else inputs.abs().amax()
    steps = rounded(inputs, share) / (top / 127)  # type: ignore[arg-type]
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert round(float(steps.abs().max())) == 127
