"""Published models on the meta device against closed forms and counts that authors printed.

Oracles: LLaMA-7B's 6,738,415,616 and the pruned 5,422,977,024 are printed by LLM-Pruner (its 20 % setting);
6,612,586,496 and 945,907,712 by the same authors for Llama-3-8B and TinyLlama; 4.54M is Compresso's trainable size
(arXiv 2310.05015). The rest is arithmetic.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from compresso.arch.base import arch_for
from compresso.core.axis import Kind
from compresso.core.budget import Budget, removable
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.lora import attach_
from compresso.edit.shrink import shrink_

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_3_8B = {**LLAMA_7B, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
TINY_LLAMA = {
    **LLAMA_7B,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}

PYTHIA_160M = GPTNeoXConfig(
    vocab_size=50304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
BLOOM_560M = BloomConfig(hidden_size=1024, n_layer=24, n_head=16)
PHI_2 = PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32)


def on_meta(sizes: dict[str, int]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


def cut(heads: int, channels: int, layers: range, hidden: int | None = None) -> Plan:
    """Keep the first units of each axis in some layers, and of the residual stream."""
    kept = {
        f"layers.{i}.{axis}": tuple(range(n)) for i in layers for axis, n in (("heads", heads), ("channels", channels))
    }
    return Plan(kept if hidden is None else {**kept, "hidden": tuple(range(hidden))})


def test_llama_7b() -> None:
    model = on_meta(LLAMA_7B)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    dense = cost()
    assert dense.parameters() == {
        "total": 6_738_415_616,
        "blocks": 6_476_005_376,
        "embeddings": 262_144_000,
        "norms": 266_240,
    }
    assert int(dense.macs) == 6_476_005_376 + 131_072_000 and int(dense.cached) == 2 * 32 * 4096

    def fewer(axis: str, size: int) -> dict[str, int]:
        smaller = cost.of(Plan({axis: tuple(range(1, size))})).parameters()
        return {group: n - smaller[group] for group, n in dense.parameters().items()}

    assert fewer("layers.7.heads", 32)["blocks"] == fewer("layers.7.heads", 32)["total"] == 2_097_152
    assert fewer("layers.7.channels", 11008)["total"] == 12_288
    assert (fewer("hidden", 4096)["blocks"], fewer("hidden", 4096)["total"]) == (1_581_056, 1_645_121)

    gates = {kind: sum(axis.size for axis in axes if axis.kind == kind) for kind in ("head", "channel", "hidden")}
    assert gates == {"head": 1_024, "channel": 352_256, "hidden": 4_096}
    adapted = attach_(model, rank=8, alpha=8)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == 4_194_304
    assert trainable + gates["head"] + gates["channel"] == 4_547_584
    assert trainable + sum(gates.values()) == 4_551_680


@pytest.mark.parametrize(
    ("sizes", "plan", "total", "blocks"),
    [
        (LLAMA_7B, cut(24, 8256, range(4, 30)), 5_422_977_024, None),
        (LLAMA_7B, cut(28, 9632, range(32), hidden=3584), 5_187_800_576, 4_958_191_616),
        (LLAMA_3_8B, cut(6, 10752, range(4, 30)), 6_612_586_496, None),
        (TINY_LLAMA, cut(3, 4224, range(4, 18)), 945_907_712, None),
    ],
    ids=["llm-pruner", "uniform", "llama-3-8b", "tinyllama"],
)
def test_published_sizes(sizes: dict[str, int], plan: Plan, total: int, blocks: int | None) -> None:
    model = on_meta(sizes)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    predicted = CostModel(axes, arch.weights(model)).of(plan).parameters()
    shrink_(model, axes, plan)
    assert predicted["total"] == total == sum(p.numel() for p in model.parameters())
    assert blocks is None or predicted["blocks"] == blocks
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("of", "config", "blocks"),
    [
        # a layer's linears: 12 d^2 + 9 d where the FFN is 4 d wide and every linear has a bias
        (AutoModelForCausalLM, OPTConfig(), 12 * (4 * 768**2 + 2 * 768 * 3072 + 4 * 768 + 3072 + 768)),
        (AutoModelForCausalLM, GPT2Config(), 12 * (12 * 768**2 + 9 * 768)),
        (AutoModelForCausalLM, PYTHIA_160M, 12 * (12 * 768**2 + 9 * 768)),
        (AutoModelForCausalLM, Phi3Config(), 32 * (4 * 3072**2 + 3 * 3072 * 8192)),
        (AutoModelForCausalLM, PHI_2, 32 * (12 * 2560**2 + 9 * 2560)),
        (AutoModelForCausalLM, GlmConfig(), 40 * (4096 * 36 * 128 + 36 * 128 + 4096 * 4096 + 3 * 4096 * 13696)),
        (AutoModelForCausalLM, Glm4Config(), 40 * (4096 * 36 * 128 + 36 * 128 + 4096 * 4096 + 3 * 4096 * 13696)),
        (BertModel, BertConfig(), 12 * (12 * 768**2 + 9 * 768)),
        (BertForMaskedLM, BertConfig(), 12 * (12 * 768**2 + 9 * 768)),
        (RobertaForMaskedLM, RobertaConfig(), 12 * (12 * 768**2 + 9 * 768)),
        (DistilBertForMaskedLM, DistilBertConfig(), 6 * (12 * 768**2 + 9 * 768)),
        (ViTForImageClassification, ViTConfig(num_labels=1000), 12 * (12 * 768**2 + 9 * 768)),
        (AutoModelForCausalLM, Gemma2Config(), 26 * (2304 * 256 * (8 + 4 + 4 + 8) + 3 * 2304 * 9216)),
        (AutoModelForCausalLM, Gemma3TextConfig(), 26 * (2304 * 256 * (8 + 4 + 4 + 8) + 3 * 2304 * 9216)),
    ],
    ids=[
        "opt-125m",
        "gpt2",
        "pythia-160m",
        "phi-3-mini",
        "phi-2",
        "glm-4-9b",
        "glm-4-9b-0414",
        "bert",
        "bert-masked",
        "roberta-base",
        "distilbert",
        "vit-base",
        "gemma2-2b",
        "gemma3",
    ],
)
def test_stacks_on_the_meta_device(of: type[PreTrainedModel], config: PreTrainedConfig, blocks: int) -> None:
    """Their own classes' num_parameters, and the closed form of the layers; then with some units gone."""
    with torch.device("meta"):
        model = of.from_config(config) if of is AutoModelForCausalLM else of(config)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    assert cost().parameters()["total"] == model.num_parameters()
    assert cost().parameters()["blocks"] == blocks
    plan = Plan(
        {
            "layers.1.heads": (1,),
            "layers.3.channels": tuple(range(100)),
            "mlp": tuple(range(1, config.num_hidden_layers)),
        }
    )
    predicted = cost.of(plan).parameters()
    shrink_(model, axes, plan)
    assert predicted["total"] == model.num_parameters() < cost().parameters()["total"]


@pytest.mark.parametrize(
    ("config", "total", "cached"),
    [
        (GPT2Config(), 124_439_808, 12 * 2 * 768),
        (PYTHIA_160M, 162_322_944, 12 * 2 * 768),
        (Phi3Config(), 3_821_079_552, 32 * 2 * 3072),
        (PHI_2, 2_779_683_840, 32 * 2 * 2560),
    ],
    ids=["gpt2", "pythia-160m", "phi-3-mini", "phi-2"],
)
def test_published_sizes_and_caches(config: PreTrainedConfig, total: int, cached: int) -> None:
    """The hub's sizes, and a cache of as many keys and values as there are heads; half of a layer's heads hold half of
    its share.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = arch_for(model.config)
    cost = CostModel(arch.axes(model), arch.weights(model))
    assert (int(cost().total), int(cost().cached)) == (total, cached)
    half = Plan({"layers.0.heads": tuple(range(config.num_attention_heads // 2))})
    assert int(cost.of(half).cached) == cached - cached // config.num_hidden_layers // 2


@pytest.mark.parametrize(
    ("config", "total", "cached"),
    [
        (BLOOM_560M, 559_214_592, 24 * 2 * 1024),
        (GlmConfig(), 9_399_951_360, 40 * 2 * 2 * 128),
    ],
    ids=["bloom-560m", "glm-4-9b"],
)
def test_published_sizes_of_models_of_few_or_fixed_heads(config: PreTrainedConfig, total: int, cached: int) -> None:
    """The hub's sizes; an eighth of the layers holds an eighth of the cache."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = arch_for(model.config)
    cost = CostModel(arch.axes(model), arch.weights(model))
    assert (int(cost().total), int(cost().cached)) == (total, cached)
    eighth = Plan({"layers": tuple(range(config.num_hidden_layers // 8))})
    assert int(cost.of(eighth).cached) * 8 == cached


def test_no_head_of_an_alibi_model_can_leave() -> None:
    """Its slopes follow from the number of heads, so that the budget says which kinds there are."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BLOOM_560M)
    axes = arch_for(model.config).axes(model)
    assert {axis.kind for axis in axes} == {Kind.CHANNEL, Kind.LAYER, Kind.ATTENTION, Kind.MLP, Kind.VOCAB}
    with pytest.raises(ValueError, match=r"no units of the kinds head; it has .*channel.*: name some of those"):
        removable(axes, Budget(0.9, kinds=(Kind.HEAD,)))


def test_a_norm_that_attention_and_ffn_read_leaves_with_the_layer() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PHI_2)
    arch = arch_for(model.config)
    block = arch.blocks(model)[0]
    q, k, v = (f"self_attn.{name}_proj" for name in "qkv")
    assert arch.linear_groups(block) == ((q, k, v, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",))
    feeders = arch.producers(block)
    assert feeders[q, k, v, "mlp.fc1"].module == "input_layernorm" and feeders["self_attn.dense",].module == v
    norm = "model.layers.0.input_layernorm.weight"
    leaving = {axis.name for axis in arch.axes(model) if norm in {piece.param for piece in axis.slices}}
    assert leaving == {"layers"}
