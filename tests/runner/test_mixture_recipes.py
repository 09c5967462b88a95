"""Shipped recipes of mixtures that merge, recover, or round by activations, shortened, end to end on a small Mixtral.

Oracles: which tensors of the written files are those of the original, byte for byte.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runner.test_offload import stored
from tests.runner.test_offload_experts import checkpoint
from tests.runner.test_one_shot import SETS

import compresso
from compresso.errors import ExportError, RecipeError
from compresso.native import MOE_FILE
from compresso.runner.options import with_options
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


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("name", ["layer-drop-int4", "expert-drop-global"])
def test_layers_that_differ_are_written_in_a_class_of_ours(name: str, instructions: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "moe", "mixtral", torch.float32)  # two layers of eight experts, top 2
    result = done(f"moe/{name}", folder, instructions, tmp_path / "out", keep=0.6 if "layer" in name else 0.8)
    assert (result.records["layout"], result.records["modeling"]) == ("native", MOE_FILE.name)
    config = json.loads((result.folder / "config.json").read_text())
    kept = json.loads((result.folder / "kept_experts.json").read_text()) if "expert" in name else []
    old, new = stored(folder), stored(result.folder)
    if name == "layer-drop-int4":
        (gone,) = {0, 1} - set(result.plan.kept["mlp"])
        assert config["per_layer_config"] == {str(gone): {"skip": ["mlp"]}}
        norm, attention = f"model.layers.{gone}.post_attention_layernorm.weight", f"model.layers.{gone}.self_attn."
        assert norm in old and norm not in new and any(own.startswith(attention) for own in new)
        assert not any(own.startswith(f"model.layers.{gone}.block_sparse_moe") for own in new)
        assert on_a_grid(new[f"model.layers.{1 - gone}.block_sparse_moe.experts.3.w1.weight"])
        assert result.records["after"]["kv_bytes_per_token"] == result.records["before"]["kv_bytes_per_token"]
    else:
        assert sum(map(len, kept)) == 13 and len(kept) == 2  # an odd number, so that two layers differ
        for layer, units in enumerate(kept):
            gate = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            assert torch.equal(new[gate], old[gate][units])
    again = compresso.load(result.folder).model
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, result.model.eval()(ids).logits, rtol=0, atol=1e-4)
    if name == "layer-drop-int4":  # what is written is the model of a further run, whose weights stay on disk
        raw = {"name": "rtn", "data": {"source": str(instructions)}, "stages": [{"wanda": {"sparsity": 0.5}}]}
        raw = with_options(raw, model=str(result.folder), sets=SETS)
        how = {"quiet": True, "allow_collapsed": True}
        twice = compresso.run(raw, result.folder, instructions, output=tmp_path / "disk", offload=True, **how)
        whole = compresso.run(raw, result.folder, instructions, output=tmp_path / "memory", **how)
        assert twice.records["layout"] == whole.records["layout"] == "native"
        one, other = stored(twice.folder), stored(whole.folder)
        assert one.keys() == other.keys() and all(torch.equal(one[own], other[own]) for own in one)
        assert (twice.folder / MOE_FILE.name).read_bytes() == MOE_FILE.read_bytes()


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (
            "layer-drop",
            {"layout": "uniform"},
            r"layout uniform cannot hold what this recipe leaves of a mixtral: layer",
        ),
        ("expert-drop-global", {"layout": "uniform"}, r"has 4; keep as many in every layer. Give layout='native'"),
        ("layer-drop", {"layout": "padded"}, r"layout padded is not written for model_type 'mixtral'"),
        ("layer-drop", {"offload": True}, r"recipe moe/layer-drop \(drop_layers\) cannot be offloaded"),
    ],
)
def test_what_would_not_be_written_is_refused_before_weights(
    recipe: str,
    given: dict[str, Any],
    message: str,
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(tmp_path / "moe", "mixtral", torch.float32)
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises((ExportError, RecipeError), match=message):
        compresso.run(f"moe/{recipe}", folder, instructions, output=tmp_path / "out", quiet=True, **given)
    assert not (tmp_path / "out").exists()
