"""Shipped recipes of mixtures that merge, recover, or round by activations, shortened, end to end on a small Mixtral.

Oracles: which tensors of the written files are those of the original, byte for byte.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runner.test_offload import stored
from tests.runner.test_offload_experts import checkpoint

import compresso
from compresso.runner.recipe import read, with_knob

SHORT: dict[str, Any] = {"batches": 1, "batch": 4, "micro_batch": 4, "max_steps": 2, "max_length": 64}


def done(name: str, folder: Path, data: Path, output: Path, **knobs: Any) -> compresso.Result:
    raw = read(name)
    raw = {**raw, "data": {**raw["data"], "source": str(data), "max_length": 64, "held": 4}}
    for knob, value in {**SHORT, "group": 8, "examples": 4, **knobs}.items():
        raw = with_knob(raw, knob, value, required=False)
    return compresso.run(raw, folder, data, output=output, quiet=True, allow_collapsed=True)


def on_a_grid(weight: torch.Tensor) -> bool:
    """Whether each eight inputs of a row are whole multiples, at most 8, of a step."""
    groups = weight.reshape(-1, 1, 8)
    steps = groups.abs().amax(-1, keepdim=True) / torch.arange(1, 9).reshape(1, 8, 1)
    codes = groups / steps.clamp(min=1e-12)
    return bool(((codes - codes.round()).abs() < 1e-3).all(-1).any(-1).all())


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("name", ["merge-25", "expert-drop-lora", "reap-50-router", "block-drop-awq"])
def test_a_recipe_of_mixtures_changes_what_it_says(name: str, instructions: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "moe", "mixtral", torch.float32)  # two layers of eight experts, top 2
    more = {"keep": 0.6} if name == "block-drop-awq" else {"lr": 1e-2} if "merge" not in name else {}
    result = done(f"moe/{name}", folder, instructions, tmp_path / "out", **more)
    old, new = stored(folder), stored(result.folder)
    changed = {own for own in new if not torch.equal(new[own], old[own])}
    same = set(new) - changed
    if name == "block-drop-awq":
        assert result.model.config.num_hidden_layers == 1
        for expert in range(8):
            assert on_a_grid(new[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"])
        assert not on_a_grid(new["model.layers.0.block_sparse_moe.gate.weight"])
        return
    left = 4 if name == "reap-50-router" else 6
    assert result.model.config.num_local_experts == left
    experts = [own for own in new if ".experts." in own]
    numbers = {own.split(".experts.")[1].split(".")[0] for own in experts}
    assert numbers == {str(i) for i in range(left)}
    attention = {own for own in new if ".self_attn." in own}
    if name == "merge-25":
        merged = result.records["stages"]["drop_experts"]["merged"]
        assert {len(groups) for groups in merged.values()} <= {1, 2} and len(merged) == 2
        assert attention <= same
    elif name == "reap-50-router":
        kept = result.plan.kept["layers.1.experts"]
        for place, expert in enumerate(kept):  # experts moved up, bit by bit; the router did not stay
            mine, theirs = (f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in (place, expert))
            assert torch.equal(new[mine], old[theirs])
        gate = "model.layers.1.block_sparse_moe.gate.weight"
        assert attention <= same and not torch.equal(new[gate], old[gate][list(kept)])
        assert result.records["stages"]["distill"]["trainable"] == 2 * 4 * 32
    else:
        assert attention <= changed
        kept = result.plan.kept["layers.0.experts"]
        gate = "model.layers.0.block_sparse_moe.gate.weight"
        assert not torch.equal(new[gate], old[gate][list(kept)])
        for place, expert in enumerate(kept):
            mine, theirs = (f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight" for n in (place, expert))
            assert not torch.equal(new[mine], old[theirs])
