"""Mixtures of experts beyond the laws: routers against transformers' own, published sizes on the meta device, what a
checkpoint holds, and what no description fits.

Oracles: transformers' routers and readers; Mixtral's 46,702,792,704 and 12.9e9 of arXiv 2401.04088; arithmetic on
configs. OLMoE's and Qwen3-30B-A3B's configs are recalled, and their totals are the sums of the published shapes.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.arch.conftest import MIXTURES
from tests.arch.test_laws import IDS, logits
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from compresso.arch.base import arch_for
from compresso.arch.routers import correction_of, routing_of
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.routing import Routing, chosen
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, ExportError
from compresso.formats.hf import save_checkpoint

Tiny = Callable[[str], PreTrainedModel]


def router_of(model: PreTrainedModel) -> torch.nn.Module:
    mlp = model.model.layers[3].mlp
    return mlp.router if hasattr(mlp, "router") else mlp.gate


@pytest.mark.parametrize("name", MIXTURES)
def test_the_choice_is_that_of_the_stock_router(tiny: Tiny, name: str) -> None:
    router = router_of(tiny(name))
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, weights, numbers = router(states)
        mine, which = chosen(found, routing_of(router), None, correction_of(router))
    stock = torch.zeros(found.shape).scatter(1, numbers, weights.float())
    assert torch.allclose(torch.zeros(found.shape).scatter(1, which, mine), stock, atol=1e-6)
    assert int((stock != 0).sum()) == 80


@pytest.mark.parametrize("name", MIXTURES)
def test_a_dropped_expert_is_minus_infinity_before_the_choice(tiny: Tiny, name: str) -> None:
    """Routers cut by hand, numbers moved back: another expert is chosen in the place of a dropped one, which a zero
    behind the choice would not do.
    """
    model = tiny(name)
    axis = next(a for a in arch_for(model.config).axes(model) if a.name == "layers.3.experts")
    each = axis.size // axis.groups
    kept = [unit for unit in range(axis.size) if unit % each != 1]
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    cut = copy.deepcopy(router_of(model))
    cut.weight, cut.num_experts = torch.nn.Parameter(cut.weight[kept]), len(kept)
    if hasattr(cut, "bias"):
        cut.bias = torch.nn.Parameter(cut.bias[kept])
    if axis.buffers:
        cut.e_score_correction_bias = cut.e_score_correction_bias[kept]
    mask = torch.zeros(axis.size)
    mask[kept] = 1
    with torch.no_grad(), gated(model, [axis], {axis.name: mask}):
        masked, weights, numbers = router_of(model)(states)
        _, wanted, places = cut(states)
    expected = torch.zeros(masked.shape).scatter(1, torch.tensor(kept)[places], wanted.float())
    assert torch.allclose(torch.zeros(masked.shape).scatter(1, numbers, weights.float()), expected, atol=1e-6)
    assert bool(masked[:, mask == 0].isneginf().all()) and int((expected > 0).sum()) == 80


@pytest.mark.parametrize("name", MIXTURES)
def test_a_checkpoint_is_read_by_transformers_and_by_us(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """With experts and a layer gone; on disk lies a tensor an expert, under the names of the hub."""
    model = tiny(name)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    kept = {
        a.name: tuple(u for u in range(a.size) if u % (a.size // a.groups) != 0) for a in axes if a.kind == "expert"
    }
    shrink_(model, axes, Plan({**kept, "layers": (0, 2, 3)}))
    save_checkpoint(model, arch.shapes(model), tmp_path / "out")
    expected = logits(model)
    opened = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=model.config._attn_implementation
    )
    ours = load_model(open_source(tmp_path / "out"))
    ours.set_attn_implementation(model.config._attn_implementation)
    assert (logits(opened.eval()) - expected).abs().max() < 1e-5
    assert (logits(ours) - expected).abs().max() < 1e-5
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = [one for one in file.keys() if ".layers.2." in one and "experts." in one]  # noqa: SIM118
    stored = {"moe_mixtral": "w2.weight", "moe_gpt_oss": "down_proj"}.get(name, "down_proj.weight")
    numbers = {one.split("experts.")[1].split(".")[0] for one in names if one.endswith(stored) and "shared" not in one}
    left = arch.shapes(model)[2].experts
    assert numbers == ({"down_proj"} if name == "moe_gpt_oss" else {str(i) for i in range(left)})


def test_what_no_config_holds_is_said(tiny: Tiny, tmp_path: Path) -> None:
    for name, plan, message in (
        (
            "moe_gpt_oss",
            {"layers.1.experts": (0, 1, 2)},
            r"layers.1 has 3 experts, layers.0 has 6; keep as many in every layer, and no other layout is written",
        ),
        ("moe_glm4", {"mlp": (0, 2, 3)}, r"layers.1 has no channels; keep some in every layer, or drop whole layers"),
        (
            "moe_mixtral",
            {f"layers.{i}.expert_channels": tuple(range(37)) for i in range(4)},
            r"experts of layers.0 have 37 channels, .* multiples of 8",
        ),
    ):
        model = tiny(name)
        arch = arch_for(model.config)
        shrink_(model, arch.axes(model), Plan(plan))
        with pytest.raises(ExportError, match=message):
            save_checkpoint(model, arch.shapes(model), tmp_path / "out")


def test_odd_widths_run_where_the_default_product_takes_none(tiny: Tiny) -> None:
    """transformers multiplies stacked experts in rows of 16 bytes; of other widths one by one."""
    model = tiny("moe_mixtral")
    model.config._experts_implementation = "grouped_mm"
    arch = arch_for(model.config)
    axes = arch.axes(model)
    plan = Plan({f"layers.{i}.expert_channels": tuple(range(33)) for i in range(4)})
    with gated(model, axes, plan.masks(axes)):
        expected = logits(model)
    shrink_(model, axes, plan)
    assert (logits(model) - expected).abs().max() < 1e-5


def test_fewer_experts_than_a_router_chooses_among_are_refused(tiny: Tiny) -> None:
    model = tiny("moe_mixtral")
    axes = arch_for(model.config).axes(model)
    with pytest.raises(ArchError, match=r"leaves layers.2.experts with 1 of 6 units; at least 2"):
        shrink_(model, axes, Plan({"layers.2.experts": (3,)}))
    for name in ("moe_deepseek", "moe_deepseek_v2"):
        model = tiny(name)
        axes = arch_for(model.config).axes(model)
        with pytest.raises(ArchError, match=r"keeps \[4, 4, 3\] units in the 3 groups of layers.2.experts"):
            shrink_(model, axes, Plan({"layers.2.experts": tuple(range(11))}))


def test_a_router_that_nobody_described(tiny: Tiny) -> None:
    model = tiny("moe_mixtral")
    model.model.layers[1].mlp.gate = torch.nn.Linear(64, 6, bias=False)
    with pytest.raises(
        ArchError, match=r"model.layers.1.mlp is a MixtralSparseMoeBlock with a router .* nobody described"
    ):
        arch_for(model.config).axes(model)


def test_fields_are_true_after_shrinking(tiny: Tiny) -> None:
    model = tiny("moe_qwen3_tied")  # layer 2 has one FFN
    axes = arch_for(model.config).axes(model)
    kept = {f"layers.{i}.experts": (0, 1, 4, 6) for i in (0, 1, 3)} | {"hidden": tuple(range(48)), "layers": (0, 2, 3)}
    shrink_(model, axes, Plan(kept))
    config, moe = model.config, model.model.layers[2].mlp
    assert (config.num_experts, config.num_experts_per_tok, config.hidden_size) == (4, 2, 48)
    assert (config.mlp_only_layers, config.decoder_sparse_step, config.num_hidden_layers) == ([1], 1, 3)
    assert (moe.experts.num_experts, moe.experts.hidden_dim, moe.gate.hidden_dim, moe.gate.num_experts) == (
        4,
        48,
        48,
        4,
    )
    assert [shape.experts for shape in arch_for(config).shapes(model)] == [4, 0, 4]
    assert logits(model, IDS).isfinite().all()


MIXTRAL_8X7B: dict[str, Any] = {}
"""The defaults of transformers' class are the published config."""
OLMOE_1B_7B: dict[str, Any] = {"num_key_value_heads": 16, "intermediate_size": 1024}
QWEN3_30B_A3B: dict[str, Any] = {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True}
DEEPSEEK_V2_LITE: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16}
DEEPSEEK_V2_LITE |= {"q_lora_rank": None, "intermediate_size": 10944, "moe_intermediate_size": 1408}
DEEPSEEK_V2_LITE |= {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK_V2: dict[str, Any] = {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128}
DEEPSEEK_V2 |= {"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160}
DEEPSEEK_V2 |= {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 3}
DEEPSEEK_V2 |= {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}


def latent_sizes(config: DeepseekV2Config) -> tuple[int, int]:
    """All parameters of such a model, and those that a token meets, added up from its config's numbers."""
    hidden, heads, q, layers = (
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.num_hidden_layers,
    )
    nope, rope, value, kv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    queries = hidden * heads * (nope + rope) if q is None else hidden * q + q + q * heads * (nope + rope)
    keys = hidden * (kv + rope) + kv + kv * heads * (nope + value)
    attention = queries + keys + heads * value * hidden
    expert, sparse = 3 * hidden * config.moe_intermediate_size, layers - config.first_k_dense_replace
    outside = 2 * config.vocab_size * hidden + hidden + layers * (attention + 2 * hidden)
    outside += config.first_k_dense_replace * 3 * hidden * config.intermediate_size
    mixture = hidden * config.n_routed_experts + config.n_shared_experts * expert
    total = outside + sparse * (mixture + config.n_routed_experts * expert)
    return total, total - sparse * (config.n_routed_experts - config.num_experts_per_tok) * expert


@pytest.mark.parametrize(
    ("config", "total"),
    [(DeepseekV2Config(**DEEPSEEK_V2_LITE), 15_706_484_224), (DeepseekV2Config(**DEEPSEEK_V2), 235_741_434_880)],
    ids=["v2-lite", "v2"],
)
def test_the_sizes_of_latent_attention_add_up(config: DeepseekV2Config, total: int) -> None:
    """The closed form is the published size (15.7e9 and 236e9, of which a token meets 2.4e9 and 21e9, the embedding not
    counted), and that of the modules.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = arch_for(config)
    cost = CostModel(arch.axes(model), arch.weights(model))()
    assert latent_sizes(config) == (int(cost.total), int(cost.active)) and int(cost.total) == total


def test_groups_limit_a_softmax_choice_only_where_the_config_says_so(tiny: Tiny) -> None:
    limited, free = (
        next(a for a in arch_for(m.config).axes(m) if a.name == "layers.2.experts")
        for m in (tiny("moe_deepseek_v2"), tiny("moe_deepseek_v2_greedy"))
    )
    assert (limited.groups, limited.min_units, limited.buffers) == (3, 3, ())
    assert (free.groups, free.min_units) == (1, 2)
    model = tiny("moe_deepseek_v2")
    model.model.layers[3].mlp.gate.topk_method = "noaux_tc"
    with pytest.raises(ArchError, match=r"topk_method='noaux_tc' of a DeepseekV2TopkRouter .* wanted greedy or group_"):
        arch_for(model.config).axes(model)


def test_a_group_is_worth_its_best_expert() -> None:
    """By hand: groups of (.4, .01) and (.3, .29); the first has the best expert, the second the larger sum."""
    scores = torch.tensor([[0.4, 0.01, 0.3, 0.29]])
    routing = Routing(1, normalised=False, scale=3.0, groups=2, of_groups=1)
    weights, numbers = chosen(scores.log(), routing)
    assert numbers.tolist() == [[0]] and torch.allclose(weights, torch.tensor([[1.2]]))
    weights, numbers = chosen(scores.log(), routing, torch.tensor([False, True, True, True]))
    assert numbers.tolist() == [[2]] and torch.allclose(weights, torch.tensor([[1.5]]))  # .3 of the .6 that are left


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (MixtralConfig(**MIXTRAL_8X7B), 46_702_792_704, 12_879_925_248),
        (OlmoeConfig(**OLMOE_1B_7B), 6_919_161_856, 6_919_161_856 - 16 * 56 * 3 * 1024 * 2048),
        (Qwen3MoeConfig(**QWEN3_30B_A3B), 30_532_122_624, 30_532_122_624 - 48 * 120 * 3 * 768 * 2048),
        (Qwen2MoeConfig(), None, None),
        (DeepseekV2Config(**{**DEEPSEEK_V2, "num_hidden_layers": 5}), None, None),
        (DeepseekV3Config(num_hidden_layers=5), None, None),
        (Glm4MoeConfig(num_hidden_layers=4), None, None),
        (GptOssConfig(num_hidden_layers=4), None, None),
    ],
    ids=[
        "mixtral-8x7b",
        "olmoe-1b-7b",
        "qwen3-30b-a3b",
        "qwen2-moe",
        "deepseek-v2",
        "deepseek-v3",
        "glm-4-moe",
        "gpt-oss",
    ],
)
def test_published_sizes_on_the_meta_device(config: PreTrainedConfig, total: int | None, active: int | None) -> None:
    """And three quarters of the experts: what is predicted is what is left; of routers a token meets less."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = arch_for(config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    dense = cost()
    assert int(dense.total) == (total or model.num_parameters()) == model.num_parameters()
    assert active is None or int(dense.active) == active
    experts = [axis for axis in axes if axis.kind == Kind.EXPERT]
    each = experts[0].size // experts[0].groups
    plan = Plan({a.name: tuple(u for u in range(a.size) if u % each < each * 3 // 4) for a in experts})
    less = cost.of(plan)
    shrink_(model, axes, plan)
    assert int(less.total) == model.num_parameters()
    rows = sum(
        (a.size - len(plan.kept[a.name])) * (config.hidden_size + (config.model_type == "gpt_oss")) for a in experts
    )
    assert int(dense.active - less.active) == rows
    if isinstance(config, MixtralConfig):
        assert int(less.total) == 35_428_241_408


def test_dropping_mixtures_counts_as_published() -> None:
    """Four of Mixtral's mixtures: 5.64e9 parameters, of which a token met 1.41e9."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig())
    arch = arch_for(model.config)
    cost = CostModel(arch.axes(model), arch.weights(model))
    dense, less = cost(), cost.of(Plan({"mlp": tuple(range(28))}))
    expert = 3 * 4096 * 14336
    assert int(dense.total - less.total) == 4 * (8 * expert + 8 * 4096 + 4096)
    assert int(dense.active - less.active) == 4 * (2 * expert + 8 * 4096 + 4096)


def test_the_index_of_a_written_config_is_json(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("moe_glm4")
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_routed_experts"] == 12 and not [key for key in config if "implementation" in key]
