"""Mixtures of experts whose layers differ: what is written computes what the masked model does, generates with its
cache, opens without compresso, and is as editable as before.

Oracles: the dense model under masks; arithmetic on configs; transformers' own reader of the family's published names.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import compresso
from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.source import open_source
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.errors import ExportError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.native import MOE_CLASSES, MOE_FILE, mixture_family_of, stock_type
from compresso.runner.options import recipe_for
from compresso.runner.recipe import read
from compresso.runner.saved_stages import load_stage, save_stage
from compresso.runner.task_options import for_model

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}
SIZES |= {"num_experts_per_tok": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-2}
QWEN = {"intermediate_size": 56, "moe_intermediate_size": 24, "num_experts": 6, "mlp_only_layers": [2]}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=6, head_dim=16),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=40),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN, head_dim=16, tie_word_embeddings=True),
    "olmoe": lambda: OlmoeConfig(**{**SIZES, "num_key_value_heads": 4}, intermediate_size=24, num_experts=6),
}
PLANS: dict[str, dict[str, tuple[int, ...]]] = {
    "a layer without its mixture": {"mlp": (0, 2, 3)},
    "a layer without its attention": {"attention": (1, 2, 3)},
    "unequal experts": {"layers.0.experts": (0, 1, 3), "layers.3.experts": (1, 2, 4, 5)},
    "all of it": {
        "layers.1.experts": (0, 4),
        "layers.3.expert_channels": tuple(range(16)),
        "attention": (1, 3),
        "mlp": (1, 2, 3),
        "hidden": tuple(range(48)),
    },
}
IDS = torch.arange(3, 30).unsqueeze(0)
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "compresso" not in sys.modules and type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    assert (model(torch.load(ids)).logits - torch.load(logits)).abs().max() <= 1e-5
"""


def dense(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith((".gate.weight", "bias")):  # stock values are all alike
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def shrunk(family: str, plan: dict[str, tuple[int, ...]]) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model without what a plan leaves out, and the logits of the dense one under masks."""
    model = dense(family)
    axes = arch_for(model.config).axes(model)
    with torch.no_grad(), gated(model, axes, Plan(plan).masks(axes)):
        masked = model(IDS).logits
    shrink_(model, axes, Plan(plan))
    return model, masked


def written(family: str, plan: dict[str, tuple[int, ...]], folder: Path) -> PreTrainedModel:
    model, _ = shrunk(family, plan)
    assert save_checkpoint(model, arch_for(model.config).shapes(model), folder) == "native"
    return model


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_computes_what_the_masked_model_does(family: str, plan: str, tmp_path: Path) -> None:
    model, masked = shrunk(family, PLANS[plan])
    arch = arch_for(model.config)
    live = model(IDS).logits
    torch.testing.assert_close(live, masked, rtol=0, atol=1e-4)
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "out") == "native"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(opened).__name__ == MOE_CLASSES[family][2].__name__
    torch.testing.assert_close(opened(IDS).logits, live, rtol=0, atol=1e-5)

    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in opened.parameters()) == count
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert sum(file.get_tensor(name).numel() for name in names) == count
    hub = ".block_sparse_moe.experts.0.w1.weight" if family == "mixtral" else ".mlp.experts.0.gate_proj.weight"
    assert any(name.endswith(hub) for name in names) and not any("gate_up_proj" in name for name in names)

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    uncached = opened.generate(IDS, use_cache=False, **options)
    assert torch.equal(opened.generate(IDS, **options), uncached)
    assert torch.equal(model.generate(IDS, **options), uncached)

    stock = as_stock(load_model(open_source(tmp_path / "out")))  # and can be edited again
    assert type(stock) is type(model) and arch.shapes(stock) == arch.shapes(model)
    assert arch.shapes(meta_model(open_source(tmp_path / "out"))) == arch.shapes(model)
    torch.testing.assert_close(stock(IDS).logits, live, rtol=0, atol=1e-5)
    assert save_checkpoint(stock, arch.shapes(stock), tmp_path / "again") == "native"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_a_finished_stage_of_such_a_folder_is_opened_again(plan: str, whole: bool, tmp_path: Path) -> None:
    """Also one that trained all weights, which is saved as a checkpoint of its own."""
    written("mixtral", PLANS[plan], tmp_path / "source")
    source = open_source(tmp_path / "source")
    model = as_stock(load_model(source))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    arch, own = arch_for(model.config), Plan()
    job = Job(model, arch, None, [], [], own, {}, {}, seed=0, out=tmp_path)
    save_stage(job, {}, tmp_path / "stage", whole=whole)
    again, plan_again, _ = load_stage(tmp_path / "stage", source, torch.float32, torch.device("cpu"))
    assert type(again) is type(model) and plan_again == own
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_unequal_heads_are_read_by_every_recipe(tmp_path: Path) -> None:
    """transformers raises where a field that layers say for themselves is asked of the whole config."""
    written("mixtral", {"layers.0.heads": (0,)}, tmp_path / "source")
    config = open_source(tmp_path / "source").config
    for name in ("moe/layer-drop", "moe/expert-drop", "wanda/attention-20", "ristretto", "gate-taylor"):
        recipe_for(read(name), "auto", config)
    for_model({**read("gate-taylor"), "task": "classification"}, config)


def test_a_layer_without_its_mixture_costs_attention_alone() -> None:
    model = dense("qwen2_moe")
    arch = arch_for(model.config)
    before = CostModel(arch.axes(model), arch.weights(model))()
    shrink_(model, arch.axes(model), Plan({"mlp": (0, 2, 3)}))
    after = CostModel(arch.axes(model), arch.weights(model))()
    expert, shared, router, norm = 3 * 24 * 64, 3 * 40 * 64 + 64, 6 * 64, 64
    assert int(before.total - after.total) == 6 * expert + shared + router + norm
    assert int(before.active - after.active) == 2 * expert + shared + router + norm
    assert int(before.count("kv")) == int(after.count("kv"))


def test_unequal_heads_in_the_layout_that_was_asked_for(tmp_path: Path) -> None:
    model, masked = shrunk("qwen3_moe", {"layers.0.heads": (1,), "layers.2.channels": tuple(range(40))})
    shapes = arch_for(model.config).shapes(model)
    save_checkpoint(model, shapes, tmp_path / "out", "native")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert entries == {"0": {"num_attention_heads": 2, "num_key_value_heads": 1}}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).logits, masked, rtol=0, atol=1e-4)


def test_equal_layers_stay_with_the_stock_class_unless_asked(tmp_path: Path) -> None:
    model = dense("mixtral")
    shapes = arch_for(model.config).shapes(model)
    assert save_checkpoint(model, shapes, tmp_path / "auto") == "uniform"
    assert save_checkpoint(model, shapes, tmp_path / "own", "native") == "native"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, model(IDS).logits)
    with pytest.raises(ExportError, match=r"layout padded is not written .* every layer, or native\."):
        save_checkpoint(model, shapes, tmp_path / "padded", "padded")


def test_what_a_layout_lacks_is_said(tmp_path: Path) -> None:
    model, _ = shrunk("mixtral", {"mlp": (0, 2, 3)})
    with pytest.raises(
        ExportError, match=r"uniform cannot hold this mixtral: layers.1 has no channels; .*Use layout native"
    ):
        save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out", "uniform")
    model, _ = shrunk("mixtral", {"layers.1.experts": (0, 1, 4)})
    model.config.output_router_logits = True
    with pytest.raises(ExportError, match=r"layout native .* as many experts in every mixture, .* set it to false"):
        save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out")
    sizes = {**SIZES, "n_routed_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40, "kv_lora_rank": 16}
    sizes |= {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1}
    other = AutoModelForCausalLM.from_config(DeepseekV3Config(**sizes, topk_group=1, first_k_dense_replace=1))
    arch = arch_for(other.config)
    shrink_(other, arch.axes(other), Plan({"mlp": (0, 1, 3)}))
    with pytest.raises(ExportError, match=r"layers.2 has no channels; .*, and no other layout is written for it"):
        save_checkpoint(other, arch.shapes(other), tmp_path / "out")
    with pytest.raises(ExportError, match=r"layout native is not written for model_type 'deepseek_v3'"):
        save_checkpoint(other, arch.shapes(other), tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: {"num_local_experts": 1}}, r"Layer 0 has 1 experts, and a token takes 2 \(num_experts_per_tok\)"),
        ({1: {"num_key_value_heads": 3}}, "Layer 1 has 4 attention heads for 3 key/value heads"),
        ({2: {"skip": ["experts"]}}, r"Layer 2 skips \['experts'\]"),
        ({3: {"intermediate_size": 0}}, "Layer 3 has an FFN of width 0"),
    ],
)
def test_impossible_layers_are_named(layers: dict[int, dict[str, object]], message: str) -> None:
    fields = {**SIZES, "intermediate_size": 48, "num_local_experts": 6, "head_dim": 16}
    with pytest.raises(StrictDataclassError, match=message):
        AutoConfig.for_model("compresso_mixtral", **fields, per_layer_config=layers)


def test_families_and_their_stock_types() -> None:
    for family, (config, _, _) in MOE_CLASSES.items():
        assert mixture_family_of(family) == mixture_family_of(config.model_type) == family
        assert stock_type(config.model_type) == family
    assert mixture_family_of("deepseek_v3") is None and stock_type("compresso_llama") == "llama"
    assert stock_type("compresso_mobilevit_pyramid") == "compresso_mobilevit_pyramid"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_it_opens_without_compresso_and_in_it(family: str, tmp_path: Path) -> None:
    live = written(family, PLANS["all of it"], tmp_path / "out")
    with torch.no_grad():
        expected = live(IDS).logits
        torch.testing.assert_close(compresso.load(tmp_path / "out").model(IDS).logits, expected, rtol=0, atol=1e-5)
    torch.save(expected, tmp_path / "logits")
    torch.save(IDS, tmp_path / "ids")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, tmp_path / "out", tmp_path / "ids", tmp_path / "logits"],
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in MOE_FILE.read_text().splitlines():
        if line.startswith(("import ", "from ")):
            assert line.split()[1].split(".")[0] in ("torch", "transformers", "huggingface_hub")


def test_gradients_and_kernels(tmp_path: Path) -> None:
    written("mixtral", PLANS["all of it"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {}
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found[kernel] = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found["sdpa"], found["eager"], strict=True))
    assert all(float(one.abs().max()) > 0 for one in found["sdpa"])
    model.set_experts_implementation("eager")
    assert {layer.mlp.experts.config._experts_implementation for layer in model.model.layers if layer.mlp} == {"eager"}
