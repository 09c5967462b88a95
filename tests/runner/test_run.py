"""A run ends in a checkpoint that loads, with records that are true."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import CANARY, RUN, RUN_WITHOUT_BUDGET, Ran
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import compresso
from compresso.core.plan import Plan
from compresso.errors import CheckpointError, NumericError, RecipeError, ResourceError
from compresso.runner.inspection import inspect
from compresso.runner.recipe import build
from compresso.runner.run import Result, run

FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("recipe.yaml", "plan.json", "records.json", "README.md", "report.html"),
}
PRUNE_ONLY: dict[str, Any] = {"name": "prune-only", "stages": [{"magnitude_structured": {"keep": 0.6}}]}


EACH_LIST = [pytest.param(recipe, marks=() if recipe == "gate-taylor" else pytest.mark.slow) for recipe in RUN]


def digest(result: Result) -> str:
    return hashlib.sha256((result.folder / "model.safetensors").read_bytes()).hexdigest()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40).unsqueeze(0)).logits


def no_nan(text: str) -> None:
    raise AssertionError(f"{text} in JSON")


@pytest.mark.parametrize("recipe", EACH_LIST)
def test_every_list_of_stages_ends_in_a_checkpoint_that_opens(ran: Ran, recipe: str) -> None:
    result = ran(recipe)
    extra = {"modeling_compresso.py"} if result.records["layout"] == "native" else set()
    assert {path.name for path in result.folder.iterdir()} == FILES | extra
    opened = (
        compresso.load(result.folder).model
        if result.records["patches"]  # which the files know nothing of
        else AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    )
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=1e-4)
    after = result.records["after"]["parameters"]
    assert sum(parameter.numel() for parameter in opened.parameters()) == after["total"]
    assert sum(tensor.numel() for tensor in load_file(result.folder / "model.safetensors").values()) == after["total"]
    assert inspect(str(result.folder))["parameters"] == after
    before = result.records["before"]["parameters"]
    (keep,) = (
        knobs["keep"] for stage in result.records["recipe"]["stages"] for knobs in stage.values() if "keep" in knobs
    )
    assert (
        after["blocks"] <= 1.005 * keep * before["blocks"] + 3 * 32
    )  # one channel more at most, and what multiples may add
    coarse = "evopress", "pipelines/decoder", "ristretto/distill"
    slack = (
        0.2 if recipe in coarse or recipe.startswith("moe/block-drop") else 0.1
    )  # an attention or a layer leaves whole: a fifth or a third of this model
    assert after["blocks"] >= (keep - slack) * before["blocks"]


@pytest.mark.parametrize("recipe", EACH_LIST)
def test_records_say_what_was_done(ran: Ran, tiny_folder: Path, recipe: str) -> None:
    result = ran(recipe)
    records = json.loads((result.folder / "records.json").read_text(), parse_constant=no_nan)
    assert records == json.loads(json.dumps(result.records))
    dense = inspect(str(tiny_folder))
    for name in ("parameters", "macs_per_token", "kv_bytes_per_token"):
        assert records["before"][name] == dense[name]
        assert records["after"].keys() == records["before"].keys()
    assert set(records["after"]["parameters"]) == {"total", "blocks", "embeddings", "norms"}
    assert list(records["stages"]) == [act.label for act in build(records["recipe"]).acts]
    assert records["bytes"] == (result.folder / "model.safetensors").stat().st_size
    assert records["bytes"] <= 1.02 * 4 * records["after"]["parameters"]["total"] + 8192  # and a header
    assert records["data"]["source"] == records["recipe"]["data"]["source"] == "rows.jsonl"
    assert Plan.from_json((result.folder / "plan.json").read_text()) == result.plan
    written = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert build(written).to_dict() == records["recipe"]
    assert written["run"]["seed"] == 0
    assert written["run"]["data"]["sha256"] == records["data"]["sha256"]
    assert written["run"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("recipe", EACH_LIST)
def test_nothing_of_this_machine_is_written(ran: Ran, recipe: str) -> None:
    for path in ran(recipe).folder.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text()
            assert CANARY not in text
            # absolute paths: a slash at the start of a word; the tokenizer's vocabulary and code are not ours to search
            if path.name not in ("tokenizer.json", "modeling_compresso.py"):
                assert not re.findall(r"(?:^|[\s\"'=])(/(?:\w|[.-])+/\S*|~/\S+)", text), path.name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUN_WITHOUT_BUDGET)
def test_lists_of_stages_without_a_budget_end_in_a_checkpoint_that_opens(ran: Ran, recipe: str) -> None:
    """What their stages leave is what compresso opens, patches of the forward included, and no block became larger."""
    result = ran(recipe)
    assert list(result.records["stages"]) == [next(iter(stage)) for stage in result.records["recipe"]["stages"]]
    opened = compresso.load(result.folder).model
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=1e-4)
    before, after = (result.records[when]["parameters"] for when in ("before", "after"))
    assert sum(parameter.numel() for parameter in opened.parameters()) == after["total"]
    assert after["blocks"] <= before["blocks"] and after["total"] <= before["total"]


@pytest.mark.slow
def test_the_default_trains_from_the_first_row_and_logs_it(ran: Ran) -> None:
    stages = ran("compresso").records["stages"]
    assert stages["learn_gates"]["curve"]["update"] == [0, 1, 2]
    assert stages["recover"]["updates"] == 3
    assert all(isinstance(loss, float) for loss in stages["recover"]["curve"]["loss"])
    # LoRA-only updates log no sparsity; that is null, which JSON can say
    assert ran("compresso/script").records["stages"]["learn_gates"]["curve"]["sparsity"][0] is None


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes_and_others_do_not(ran: Ran) -> None:
    assert digest(ran("compresso")) == digest(ran("compresso", copy=1))
    assert digest(ran("compresso")) != digest(ran("compresso", seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["uniform", "padded", "native"])
def test_layouts_hold_the_same_function(ran: Ran, layout: str) -> None:
    result = ran("gate-taylor", layout=layout, sets=("stages.gate_taylor.batches=1",))
    assert result.records["layout"] == layout
    config = json.loads((result.folder / "config.json").read_text())
    if layout == "native":
        assert config["model_type"] == "compresso_llama"
        return
    assert config["model_type"] in ("llama", "mistral")
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    if config["model_type"] == "llama":  # the stock class, called by its name
        torch.testing.assert_close(
            logits(LlamaForCausalLM.from_pretrained(result.folder, dtype=torch.float32)),
            logits(result.model),
            rtol=0,
            atol=1e-4,
        )
    widths = {json.dumps(vars_of(shape)) for shape in widths_of(result)}
    assert len(widths) == 1 or layout == "padded"


def widths_of(result: Result) -> list[Any]:
    from compresso.arch.base import arch_for

    return arch_for(result.model.config).shapes(result.model)


def vars_of(shape: Any) -> list[int]:
    return [shape.query_heads, shape.kv_heads, shape.channels]


@pytest.mark.slow
def test_layout_uniform_reaches_the_stages_from_python_too(ran: Ran) -> None:
    stages = ran("compresso", layout="uniform").records["recipe"]["stages"]
    assert stages[0]["learn_gates"]["layout"] == "uniform"


@pytest.mark.usefixtures("quick_reopening")
def test_keeping_all_is_the_identity(tiny_folder: Path, tmp_path: Path) -> None:
    raw = {"stages": [{"magnitude_structured": {"keep": 1.0}}]}
    result = run(raw, tiny_folder, output=tmp_path / "out", quiet=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, result.folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("quick_reopening")
def test_a_live_model_is_pruned_and_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    result = run(
        PRUNE_ONLY, live, output=tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tiny_folder), quiet=True
    )
    assert result.records["model"]["name"] == "LlamaForCausalLM"
    assert (result.folder / "tokenizer.json").is_file()
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())
    with pytest.raises(CheckpointError, match="brings its own"):
        run(PRUNE_ONLY, tiny_folder, output=tmp_path / "other", tokenizer=AutoTokenizer.from_pretrained(tiny_folder))


@pytest.mark.usefixtures("quick_reopening")
def test_a_pruned_model_is_pruned_again(ran: Ran, tmp_path: Path) -> None:
    first = ran("gate-taylor")  # native: layers of different widths
    again = run(
        {"stages": [{"magnitude_structured": {"keep": 0.8}}]}, first.folder, output=tmp_path / "out", quiet=True
    )
    assert again.records["before"]["parameters"] == first.records["after"]["parameters"]
    assert again.records["after"]["parameters"]["blocks"] <= 0.8 * first.records["after"]["parameters"]["blocks"]


@pytest.mark.usefixtures("quick_reopening")
def test_weights_with_nan_are_refused_before_pruning(tiny_folder: Path, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    live.save_pretrained(tmp_path / "bad")
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        run(PRUNE_ONLY, tmp_path / "bad", output=tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_public_run_refuses_an_unknown_layout(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'uniform'"):
        compresso.run(PRUNE_ONLY, tiny_folder, output=tmp_path / "out", layout="unifrom")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prompted"), [("text", False), ("instructions", True)])
def test_examples_fit_the_context_and_the_prompt_stands_only_before_instructions(
    tiny_folder: Path, instructions: Path, tmp_path: Path, quick_reopening: None, kind: str, prompted: bool
) -> None:
    """Windows longer than the model's context would train positions that it does not have."""
    data = instructions
    if kind == "text":
        data = tmp_path / "text.jsonl"
        data.write_text("".join(json.dumps({"text": f"A pigazz lives in dune {n}. " * 8}) + "\n" for n in range(200)))
    recipe = {
        "name": "x",
        "data": {"max_length": 4096, "held": 2},
        "stages": [{"recover": {"steps": 1, "batch": 2, "micro_batch": 2}}],
    }
    result = run(recipe, tiny_folder, str(data), output=tmp_path / "out", quiet=True)
    context = LlamaForCausalLM.from_pretrained(tiny_folder).config.max_position_embeddings
    assert result.records["recipe"]["data"]["max_length"] == context
    examples = result.records["data"]["examples"]
    assert examples["tokens"] <= examples["rows"] * context
    assert (result.records["prompt"] is not None) == prompted
    assert (compresso.load(tmp_path / "out").prompt is not None) == prompted


@pytest.mark.slow
def test_adapters_are_kept_apart_on_request(tiny_folder: Path, tmp_path: Path, quick_reopening: None, ran: Ran) -> None:
    """The result minus the kept adapter is the model before recovery,
    and the folder still opens as a plain checkpoint.
    """
    sets = ("stages.recover.save_adapter=true", "stages.recover.lr=0.01")
    result = ran("magnitude-structured", sets=sets)
    folder = result.folder / "adapters" / "recover"
    assert not any(str(tiny_folder) in path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    scale = json.loads((folder / "adapter_config.json").read_text())
    after = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).get_parameter(
        "model.layers.1.mlp.up_proj.weight"
    )
    first = {"name": "x", "stages": [{"magnitude_structured": {"keep": 0.7}}]}
    before = run(first, tiny_folder, output=tmp_path / "out", quiet=True).model
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    added = adapter[name.format("B")] @ adapter[name.format("A")] * scale["lora_alpha"] / scale["r"]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(
        after - added, before.get_parameter("model.layers.1.mlp.up_proj.weight"), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1 was asked for, .*; launch with --fsdp_version 2"),
        ({}, "FSDP 1 was asked for"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "launch without --fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "lm_head"}, "spreads all blocks here; unset it"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "the knob checkpointing: true"),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "without --fsdp_reshard_after_forward"),
        ({"FSDP_VERSION": "2", "WORLD_SIZE": "1"}, r"one process was launched, .*; launch several \(--num_processes\)"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused_before_weights_are_read(
    told: dict[str, str], said: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", **told}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.modules["compresso.runner.execution"], "with_weights", None)
    with pytest.raises(ResourceError, match=said):
        run(PRUNE_ONLY, tiny_folder, output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
