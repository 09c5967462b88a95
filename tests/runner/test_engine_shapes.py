"""`--target ENGINE`: shapes an engine likes become multiples of the budgets,
plans say what they cost, results obey them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Call
from transformers import Gemma2Config, LlamaConfig, Phi3Config, PreTrainedConfig

from compresso.core.axis import Kind
from compresso.errors import RecipeError
from compresso.runner.engine_shapes import (
    for_engine,
    misfits,
    multiples,
    parse_engine,
    without_multiple,
    writable_heads,
)
from compresso.runner.options import recipe_for, with_options
from compresso.runner.run import run
from compresso.stage import dumped

GATES: dict[str, Any] = {"name": "short", "stages": [{"gate_taylor": {"keep": 0.6}}, {"recover": {}}]}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """LLaMA with 8 query and 4 key/value heads of 16, so that o_proj reads 32 of a unit; 96 hidden dimensions, 400
    channels.
    """
    given = LlamaConfig(
        hidden_size=96,
        intermediate_size=400,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=1000,
        architectures=["LlamaForCausalLM"],
    )
    (tmp_path / "config.json").write_text(given.to_json_string())
    return str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        ("llama.cpp:q4_k", {Kind.HEAD: 8, Kind.CHANNEL: 256, Kind.HIDDEN: 256}),
        ("llama.cpp:q8_0", {Kind.CHANNEL: 32, Kind.HIDDEN: 32}),
        ("awq:g128", {Kind.HEAD: 4, Kind.CHANNEL: 128, Kind.HIDDEN: 128}),
        ("gptq:g48", {Kind.HEAD: 3, Kind.CHANNEL: 48, Kind.HIDDEN: 48}),
        ("vllm:tp2", {Kind.HEAD: 2, Kind.CHANNEL: 2}),
        ("vllm:tp1", {}),
    ],
)
def test_multiples_make_every_input_fit(engine: str, wanted: dict[Kind, int], config: str) -> None:
    assert multiples(parse_engine(engine), config) == wanted


def test_a_recipe_s_own_multiples_hold_as_well(config: str) -> None:
    raw = {
        **GATES,
        "stages": [{"gate_taylor": {"keep": 0.6, "multiple_of": {"channel": 12, "layer": 2}}}, {"recover": {}}],
    }
    want = parse_engine("vllm:tp8")
    held = multiples(want, config)
    found = for_engine(raw, want, held)
    knobs = found["stages"][0]["gate_taylor"]
    assert knobs["multiple_of"] == {"channel": 24, "layer": 2, "head": 8} and knobs["layout"] == "uniform"
    assert found["stages"][1] == {"recover": {}}
    free = without_multiple(found, Kind.CHANNEL, 8)["stages"][0]["gate_taylor"]["multiple_of"]
    assert free == {"layer": 2, "head": 8}


def test_dense_sizes_that_do_not_fit_are_said(config: str) -> None:
    want = parse_engine("llama.cpp:q4_k")
    told = misfits(want, multiples(want, config), config)
    assert [line.split(": ")[1].split(";")[0] for line in told] == [
        "400 channels are no multiple of 256",
        "96 hidden dimensions are no multiple of 256",
        "4 heads are no multiple of 8",
    ]


def test_a_plan_says_what_each_constraint_costs(config: str, call: Call) -> None:
    plain = json.loads(call("plan", "magnitude-structured", "--model", config, "--keep", 0.6, "--json")[1])
    code, out, error = call(
        "plan", "magnitude-structured", "--model", config, "--keep", 0.6, "--target", "awq:g64", "--json"
    )
    assert code == 0, error
    facts = json.loads(out)
    assert facts["shapes"]["layers.0.heads"][0] % 2 == 0 and facts["shapes"]["layers.0.channels"][0] % 64 == 0
    costs = {
        note.split(": ")[1]: note.split(": ")[2]
        for note in facts["notes"]
        if note.startswith("awq:g64: ") and note.endswith("parameters")
    }
    assert list(costs) == [
        "channels in multiples of 64",
        "hidden dimensions in multiples of 64",
        "heads in multiples of 2",
    ]
    assert any(int(cost.split()[0].replace(",", "")) for cost in costs.values())
    assert facts["after"] != plain["after"]


@pytest.mark.usefixtures("quick_reopening")
def test_a_result_obeys(tiny_folder: Path, tmp_path: Path) -> None:
    raw = with_options(
        "magnitude-structured",
        model=str(tiny_folder),
        keep=0.57,
        max_steps=1,
        target="awq:g16",
        sets=["stages.recover.batch=4"],
    )
    first = {**raw, "stages": raw["stages"][:1]}
    result = run(first, tiny_folder, output=tmp_path / "out", quiet=True, allow_collapsed=True)
    for shape in result.model.model.layers:
        assert shape.self_attn.o_proj.in_features % 16 == 0 and shape.mlp.down_proj.in_features % 16 == 0


@pytest.mark.parametrize("engine", ["llama.cpp", "llama.cpp:q9", "awq:128", "vllm:tp0", "tensorrt:fp8", ""])
def test_unknown_engines_are_refused(engine: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown engine; give llama\.cpp:q4_k, .* or vllm:tp2"):
        parse_engine(engine)


def gemma(hidden: int, heads: int, groups: int) -> Gemma2Config:
    return Gemma2Config(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups, head_dim=16, vocab_size=64
    )


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (gemma(64, 8, 4), 2),  # 6 query heads do not divide 64
        (gemma(96, 8, 4), 1),
        (gemma(64, 8, 8), 4),  # 6 of 2, 4, 6, 8 does not divide it
        (gemma(2304, 8, 4), 1),  # Gemma 2 2B
        (Phi3Config(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, vocab_size=64, pad_token_id=0), 1),
    ],
)
def test_heads_are_held_to_what_the_family_s_config_takes(config: PreTrainedConfig, multiple: int) -> None:
    """transformers' Gemma wants heads to divide the hidden size, though head_dim is given:
    a run ended in a traceback.
    """
    assert writable_heads(config) == multiple
    gates = dumped(recipe_for(GATES, "auto", config).stages[0][1])
    if config.model_type == "gemma2":
        assert (gates["multiple_of"] or {}).get("head", 1) == multiple
        assert gates["layout"] == "uniform"
