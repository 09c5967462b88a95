"""Recipes on families whose config holds one width for all layers: they end in stock checkpoints, or say why they
cannot.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.test_laws import described
from tests.conftest import reopen_here
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
)

import compresso
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.errors import BudgetError, CompressoError, ExportError, RecipeError, ResumeError
from compresso.job import Job
from compresso.runner.options import with_options
from compresso.runner.plan import plan
from compresso.runner.saved_stages import load_stage, save_stage

TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=512, n_inner=48),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "phi3": lambda: Phi3Config(**SIZES, num_key_value_heads=4, intermediate_size=48),
    "gemma2": lambda: Gemma2Config(**SIZES, num_key_value_heads=4, head_dim=8, intermediate_size=48),
    "glm4": lambda: Glm4Config(**SIZES, num_key_value_heads=4, head_dim=8, intermediate_size=48),
    "bloom": lambda: BloomConfig(**TOKENS, hidden_size=32, n_layer=4, n_head=4),
    "phi": lambda: PhiConfig(**SIZES, intermediate_size=48),
}
LORA = {"rank": 2, "alpha": 4, "batch": 8, "micro_batch": 8, "lr": 1e-3}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of a family, whose weights are large enough to tell units apart, and the nano's
    tokenizer.
    """
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_(0, 0.2, generator=generator)
            model.save_pretrained(made[name])
            AutoTokenizer.from_pretrained(nano.path()).save_pretrained(made[name])
        return made[name]

    return folder


def pruned_then_tuned(kinds: list[str]) -> dict[str, Any]:
    prune = {"keep": 0.7, "kinds": kinds, "batches": 2, "batch": 8}
    return {
        "name": "short",
        "data": {"max_length": 64, "held": 8, "prompt": False},
        "stages": [{"gate_taylor": prune}, {"recover": {**LORA, "steps": 3}}],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gpt2", ["channel"]),
        ("gpt_neox", ["channel"]),
        ("opt", ["channel"]),
        ("phi3", ["head", "channel"]),
        ("gemma2", ["head", "channel"]),
        ("glm4", ["head", "channel"]),
        ("phi", ["head", "channel"]),
    ],
)
@pytest.mark.usefixtures("quick_reopening")
def test_a_recipe_ends_in_a_stock_checkpoint(
    name: str, kinds: list[str], family: Callable[[str], Path], instructions: Path, tmp_path: Path
) -> None:
    result = compresso.run(pruned_then_tuned(kinds), family(name), instructions, output=tmp_path / "out", quiet=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert opened.config.model_type == name and result.records["layout"] == "uniform"
    before, after = (result.records[when]["parameters"] for when in ("before", "after"))
    assert opened.num_parameters() == after["total"] == compresso.inspect(tmp_path / "out")["parameters"]["total"]
    assert 0.55 < after["blocks"] / before["blocks"] <= 0.72
    with torch.no_grad():
        ids = torch.arange(3, 40).unsqueeze(0)
        torch.testing.assert_close(
            opened(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "gemma2"])
@pytest.mark.usefixtures("quick_reopening")
def test_query_heads_that_leave_one_by_one_end_in_a_stock_checkpoint(
    name: str, tmp_path: Path, instructions: Path
) -> None:
    config = CONFIGS[name]()
    config.num_key_value_heads = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(tmp_path / "in")
    knobs = {"keep": 0.87, "kinds": ["query"], "masks": 10, "batches": 1, "batch": 4, "micro_batch": 4}
    raw = {**pruned_then_tuned([]), "stages": [{"bonsai": {**knobs, "round_share": 0.15}}]}
    out = compresso.run(raw, tmp_path / "in", instructions, output=tmp_path / "out", quiet=True, allow_collapsed=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert opened.config.model_type == name and out.records["layout"] == "uniform"
    assert (opened.config.num_attention_heads, opened.config.num_key_value_heads) == (2, 2)
    with torch.no_grad():
        ids = torch.arange(3, 40).unsqueeze(0)
        torch.testing.assert_close(
            opened(input_ids=ids).logits, out.model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4
        )


def test_a_shape_that_no_checkpoint_holds_is_refused_before_weights_are_read(
    family: Callable[[str], Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ExportError, match=r"cannot hold this gpt2: .*keep all heads and prune FFN channels"):
        compresso.run(pruned_then_tuned(["head"]), family("gpt2"), instructions, output=tmp_path / "out")
    with pytest.raises(ExportError, match="layout native is not written for model_type 'opt'"):
        compresso.run(
            pruned_then_tuned(["channel"]), family("opt"), instructions, output=tmp_path / "out", layout="native"
        )
    with pytest.raises(ExportError, match="layout native is not written for model_type 'opt'"):
        plan(pruned_then_tuned(["channel"]), str(family("opt")), layout="native")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_bloom_loses_layers_and_nothing_else(
    family: Callable[[str], Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = pruned_then_tuned(["head"])
    dropped["stages"][0] = {"drop_layers": {"score": "influence", "drop": 1, "batches": 2, "batch": 8}}
    result = compresso.run(dropped, family("bloom"), instructions, output=tmp_path / "out", quiet=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (opened.config.model_type, opened.config.n_layer) == ("bloom", 3)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected = result.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ExportError, match=r"cannot hold this bloom: .*drop whole layers"):
        compresso.run(pruned_then_tuned(["channel"]), family("bloom"), instructions, output=tmp_path / "new")
    with pytest.raises(CompressoError, match="no units of the kinds head; it has"):
        compresso.run(pruned_then_tuned(["head"]), family("bloom"), instructions, output=tmp_path / "new")


@pytest.mark.parametrize("stage", [{"loraprune": {"steps": 4, "spared": 0.0}}, {"lorashear": {"unprunable": 0.0}}])
def test_adapters_of_a_conv1d_are_refused_before_weights_are_read(
    stage: dict[str, Any],
    family: Callable[[str], Path],
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    knobs = {"keep": 0.7, "kinds": ["channel"], "rank": 2, "batch": 8, "micro_batch": 8}
    stages = [{name: knobs | more} for name, more in stage.items()]
    raw = {"name": "short", "data": {"max_length": 64, "held": 8, "prompt": False}, "stages": stages}
    with pytest.raises(
        RecipeError, match=r"transformer\.h\.0\.\S+ is a Conv1D, whose units cannot be scored by adapters"
    ):
        compresso.run(raw, family("gpt2"), instructions, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["phi3", "opt"])
def test_a_stage_of_uneven_widths_comes_back(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(family(name))
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    arch, axes = described(model)
    kept = {"layers.0.channels": (1, 5, 7), "layers.1.heads": (0, 3)} | (
        {"hidden": tuple(range(4, 30))} if name == "phi3" else {}
    )
    shrink_(model, axes, Plan(kept))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    job = Job(
        model=model,
        arch=arch,
        tokenizer=None,
        rows=[],
        held=[],
        plan=Plan(kept),
        records={},
        identity={},
        seed=0,
        out=tmp_path,
        quiet=True,
    )
    save_stage(job, {"held_loss": 1.0}, tmp_path / "01-prune")
    again, removed, facts = load_stage(tmp_path / "01-prune", source, torch.float32, torch.device("cpu"))
    assert removed == job.plan and facts["before"] == {"held_loss": 1.0}
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    (tmp_path / "01-prune" / "plan.json").write_text(Plan({"layers.0.channels": (1, 5)}).to_json())
    with pytest.raises(
        ResumeError, match=r"is \[.*\] in 01-prune, which the plan does not give; start anew with --overwrite"
    ):
        load_stage(tmp_path / "01-prune", source, torch.float32, torch.device("cpu"))


def test_meta_models_say_the_same(family: Callable[[str], Path]) -> None:
    for name in CONFIGS:
        source = open_source(family(name))
        on_meta, with_weights = meta_model(source), load_model(source, dtype=torch.float32, device=torch.device("cpu"))
        assert described(on_meta)[1] == described(with_weights)[1]


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ODD: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": CONFIGS["gpt2"],
    "opt-350m": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi3 of longrope": lambda: Phi3Config(
        **SIZES,
        num_key_value_heads=4,
        intermediate_size=48,
        original_max_position_embeddings=64,
        rope_parameters=ROPE | {"original_max_position_embeddings": 64},
    ),
}


@pytest.fixture
def shaped(tmp_path: Path) -> Callable[[str], str]:
    """A config.json alone: what is refused before weights are read needs none."""

    def of(name: str) -> str:
        config = ODD[name]()
        config.architectures = [
            {"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM"}.get(config.model_type, "Phi3ForCausalLM")
        ]
        config.save_pretrained(tmp_path / name)
        return str(tmp_path / name / "config.json")

    return of


DEPTH = [
    {"drop_layers": {"drop": 1}},
    {"drop_layers": {"drop": 1, "score": "angular"}},
    {"drop_layers": {"keep": 0.6, "score": "perplexity"}},
    {"llm_pruner": {"keep": 0.7, "scope": "layer"}},
    {"llm_pruner": {"ratio": 0.3, "scope": "layer"}},
    {"gate_taylor": {"keep": 0.6, "kinds": ["layer"]}},
    {"minitron": {"keep": 0.6, "kinds": ["layer"]}},
]


@pytest.mark.parametrize("stage", DEPTH, ids=str)
def test_no_whole_layer_leaves_a_model_whose_norms_lie_behind_its_sums(
    stage: dict[str, Any], shaped: Callable[[str], str]
) -> None:
    with pytest.raises(
        BudgetError, match=r"(no units of the kinds layer; .*name some of those|give scope: block)"
    ) as met:
        plan({"name": "short", "stages": [stage]}, shaped("opt-350m"))
    assert "\n" not in str(met.value)


@pytest.mark.parametrize("knobs", [{"keep": 0.7}, {"ratio": 0.25}], ids=str)
def test_hidden_dimensions_that_are_not_there_are_refused(knobs: dict[str, Any], shaped: Callable[[str], str]) -> None:
    with pytest.raises(BudgetError, match=r"scope='channel' removes .* hidden, and the model has none .* scope: block"):
        plan({"name": "short", "stages": [{"llm_pruner": {"scope": "channel", **knobs}}]}, shaped("gpt2"))


@pytest.mark.parametrize(
    ("stage", "cure"),
    [
        ({"gate_taylor": {"keep": 0.7}}, r"kinds: \[channel\]"),
        ({"minitron": {"keep": 0.7}}, r"kinds: \[channel\]"),
        ({"llm_pruner": {"keep": 0.7}}, "Stage 'llm_pruner' has no kinds to leave out: take one that has"),
    ],
)
def test_heads_of_a_longrope_stay(stage: dict[str, Any], cure: str, shaped: Callable[[str], str]) -> None:
    """Its factors are a list of half a head's width, which the stock config takes from hidden size and heads."""
    with pytest.raises(ExportError, match=cure):
        plan({"name": "short", "stages": [stage]}, shaped("phi3 of longrope"))
    plan(
        {"name": "short", "stages": [{"gate_taylor": {"keep": 0.7, "kinds": ["channel"]}}]}, shaped("phi3 of longrope")
    )


def test_kinds_that_are_not_there_are_said_with_what_the_rest_gives(
    family: Callable[[str], Path], instructions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 has no hidden dimensions that could leave, so that its channels alone meet the size."""
    stage = {"minitron": {"keep": 0.8, "batches": 1, "batch": 4, "micro_batch": 4}}
    raw = {"name": "short", "data": {"max_length": 64, "held": 8, "prompt": False}, "stages": [stage]}
    shown = plan(raw, str(family("gpt2")))
    notes = [note for note in shown["notes"] if "no hidden dimensions" in note]
    assert len(notes) == 1 and "channels alone, which hold" in notes[0]
    assert shown["after"]["parameters"]["blocks"] <= 0.8 * shown["before"]["parameters"]["blocks"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
        result = compresso.run(
            raw, family("gpt2"), instructions, output=tmp_path / "out", measure="none", allow_collapsed=True
        )
    assert f"minitron: {result.records['stages']['minitron']['lacking_kinds']}" == notes[0]
    assert notes[0] in [record.getMessage() for record in caplog.records]
    all_there = {"name": "short", "stages": [{"gate_taylor": {"keep": 0.8, "kinds": ["channel"]}}]}
    assert not any("that could leave" in note for note in plan(all_there, str(family("gpt2")))["notes"])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("target", [None, "awq:g2"])
def test_multiples_of_tokens_are_no_budgets(name: str, target: str | None, family: Callable[[str], Path]) -> None:
    """What a family or an engine holds heads to is no business of cut_vocab, whose multiple is a number."""
    stages = [{"cut_vocab": {"most": 700, "multiple_of": 8}}, {"gate_taylor": {"keep": 0.8, "kinds": ["channel"]}}]
    raw = with_options({"name": "short", "stages": stages}, model=str(family(name)), target=target)
    assert plan(raw, str(family(name)))["shapes"]["vocab"] == [700, 1024]


@pytest.mark.parametrize("given", [8, {"head": "two"}, ["head"], "head"], ids=str)
def test_multiples_of_another_form_are_refused(given: object, family: Callable[[str], Path]) -> None:
    raw = {"name": "short", "stages": [{"gate_taylor": {"keep": 0.8, "multiple_of": given}}]}
    with pytest.raises(RecipeError, match="stage 'gate_taylor': multiple_of"):
        with_options(raw, model=str(family("gpt2")), target="awq:g16")


def test_what_no_floor_holds_is_not_laid_to_one(shaped: Callable[[str], str]) -> None:
    """Biases keep the last channel, and no channel holds anything of a cache: other kinds are the cure."""
    stage = {"gate_taylor": {"keep": 0.5, "of": "kv", "kinds": ["channel"]}}
    with pytest.raises(BudgetError, match=r"in what the kinds channel do not reach\. Raise keep to 1\.0 or add kinds"):
        plan({"name": "short", "stages": [stage]}, shaped("gpt2"))
