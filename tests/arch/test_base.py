"""Which models are described, and what is said about those that are not."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteMoeConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
)

from compresso.arch.base import arch_for
from compresso.arch.decoder_shape import cache_slots
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError

Tiny = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(),
        Qwen2Config(),
        Qwen3Config(),
        OPTConfig(),
        BertConfig(),
        ViTConfig(),
        Gemma2Config(),
        Gemma3TextConfig(),
    ],
)
def test_described(config: PreTrainedConfig) -> None:
    assert arch_for(config).name == config.model_type


@pytest.mark.parametrize("config", [FalconConfig(), GraniteMoeConfig()])
def test_unknown_architectures_are_named_with_the_known_ones(config: PreTrainedConfig) -> None:
    with pytest.raises(
        ArchError,
        match=rf"'{config.model_type}'; described are .*llama, mistral, mixtral, .*qwen2, .*qwen3.*\. Use one of these",
    ):
        arch_for(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 96), ("vocab_size", 7), ("num_hidden_layers", 3), ("tie_word_embeddings", True)],
)
def test_a_config_that_lies(tiny: Tiny, field: str, value: int) -> None:
    model = tiny("llama_mha")
    setattr(model.config, field, value)
    with pytest.raises(ArchError, match=f"{field}.*{value}"):
        arch_for(model.config).axes(model)


def test_layer_types_that_are_not_plain(tiny: Tiny) -> None:
    model = tiny("qwen2")
    model.config.layer_types[1] = "chunked_attention"
    with pytest.raises(ArchError, match="chunked_attention"):
        arch_for(model.config).axes(model)


def test_modules_that_are_not_plain(tiny: Tiny) -> None:
    model = tiny("llama_mha")
    arch = arch_for(model.config)
    model.model.layers[2].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ArchError, match=r"layers\.2\.mlp\.extra\.weight"):
        arch.axes(model)
    del model.model.layers[2].mlp.extra
    model.model.layers[3].self_attn.k_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(ArchError, match=r"layers\.3\.self_attn"):
        arch.axes(model)
    headless = LlamaModel(
        LlamaConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    )
    with pytest.raises(ArchError, match="with its head"):
        arch.axes(headless)


def test_removed_sub_layers_have_no_axes(tiny: Tiny) -> None:
    model = tiny("qwen3")
    arch = arch_for(model.config)
    axes = arch.axes(model)
    assert [axis.name for axis in axes][-5:] == ["hidden", "layers", "attention", "mlp", "vocab"]
    shrink_(model, axes, Plan({"layers.0.heads": (), "layers.2.channels": (1, 2)}))
    smaller = {axis.name: axis for axis in arch.axes(model)}
    assert "layers.0.heads" not in smaller
    assert smaller["layers.2.channels"].size == 2 and smaller["attention"].size == 4
    assert not any(piece.unit == 0 for piece in smaller["attention"].slices)
    assert arch.linear_groups(arch.blocks(model)[0]) == (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def test_a_surviving_bias_keeps_one_unit(tiny: Tiny) -> None:
    model = tiny("llama_biased")
    axes = {axis.name: axis for axis in arch_for(model.config).axes(model)}
    assert axes["layers.0.heads"].min_units == axes["layers.0.channels"].min_units == 1
    with pytest.raises(ArchError, match=r"layers\.0\.heads with 0 of 4 units; at least 1"):
        shrink_(model, tuple(axes.values()), Plan({"layers.0.heads": ()}))


def test_hidden_width_that_the_heads_do_not_divide(tiny: Tiny) -> None:
    """Llama's config refuses such a width on construction; live surgery, forward and generate must not care."""
    sizes = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 32,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0)).eval()
    arch = arch_for(model.config)
    kept = {"hidden": tuple(range(320)), "layers.0.heads": tuple(range(7)), "layers.1.heads": tuple(range(7))}
    shrink_(model, arch.axes(model), Plan(kept))
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.head_dim) == (320, 7, 64)
    ids = torch.arange(6)[None]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 10)


def test_cache_slots() -> None:
    assert cache_slots([None, "", ""]) == (["", "", ""], [None, 0, 1])
    assert cache_slots(["f", "s", "f", "s"]) == (["f", "s", "f", "s"], [0, 1, 2, 3])
    assert cache_slots(["f", None, "f", "s"]) == (["f", "f", "f", "s"], [0, None, 1, 3])
    assert cache_slots([None, "s", "s", "f"]) == (["s", "s", "s", "f"], [None, 0, 1, 3])
    assert cache_slots([None, None]) == (["", ""], [None, None])


def test_a_stack_whose_modules_are_not_the_stock_ones(tiny: Tiny) -> None:
    model = tiny("bert")
    arch = arch_for(model.config)
    model.config.num_hidden_layers = 3
    with pytest.raises(ArchError, match="num_hidden_layers=3, the model has 4"):
        arch.axes(model)
    model.config.num_hidden_layers = 4
    model.bert.encoder.layer[1].intermediate.dense = torch.nn.Linear(64, 90)
    with pytest.raises(ArchError, match=r"layer\.1\.output\.dense reads 176 channels, \[90\]"):
        arch.axes(model)
    small = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    crossed = BertLMHeadModel(BertConfig(**small, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ArchError, match=r"crossattention.*not part of a plain bert"):
        arch.axes(crossed)
    with pytest.raises(ArchError, match=r"LlamaModel has no layers at bert\.encoder\.layer or encoder\.layer"):
        arch.axes(LlamaModel(LlamaConfig(**small)))


@pytest.mark.parametrize(("name", "heads"), [("opt_unbiased", 4), ("gemma3", 2)])
def test_sub_layers_of_a_stack_that_are_gone(tiny: Tiny, name: str, heads: int) -> None:
    model = tiny(name)
    arch = arch_for(model.config)
    kept = {
        "layers.0.heads": (),
        "layers.1.channels": (),
        "layers.2.heads": (heads - 1,),
        "layers.2.channels": (1, 2),
        "layers": (0, 1, 2),
    }
    shrink_(model, arch.axes(model), Plan(kept))
    names = {axis.name for axis in arch.axes(model)}
    assert "layers.0.heads" not in names and "layers.1.channels" not in names and "layers.3.heads" not in names
    shapes = arch.shapes(model)
    assert [(shape.kv_heads, shape.channels) for shape in shapes] == [(0, 176), (heads, 0), (1, 2)]
    assert model.config.num_hidden_layers == 3 and model.config.num_attention_heads == 4
    slots = [arch.blocks(model)[i].self_attn.layer_idx for i in (1, 2)]
    assert slots == (
        [0, 1] if name == "opt_unbiased" else [0, 2]
    )  # gemma's second layer sees everything; the third has a window
    assert not any("norm" in key for key, _ in arch.blocks(model)[0].self_attn.named_parameters())
    assert len(arch.linear_groups(arch.blocks(model)[0])) == 2
