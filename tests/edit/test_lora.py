"""Adapters: what is trained, seeds, shrunk models, merging (with peft's own merge as the oracle), saving."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.methods.test_awq_experts import FAMILIES
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.lora import adapter_parameters, attach_, merge_, save_adapter
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError, RecipeError

Make = Callable[..., LlamaForCausalLM]
IDS = torch.arange(2, 9)[None]


def trained(adapted: PeftModel, scale: float = 0.3) -> PeftModel:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale, generator=generator)
    return adapted


def uneven(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model whose layers differ in heads, one of them without attention."""
    plan = Plan({"layers.0.heads": (), "layers.1.heads": (1,), "hidden": tuple(range(27))})
    shrink_(model, arch_for(model.config).axes(model), plan)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_float32_adapters_are_trainable_and_start_at_zero(make: Make, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    adapted = attach_(model, rank=4, alpha=8)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert len(trainable) == 3 * 2 * 2
    assert all((p == 0).all() if "lora_B" in name else p.std() > 0 for name, p in trainable.items())
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS).logits, before)


def test_a_seed_fixes_the_adapters_and_the_global_generator_is_left_alone(make: Make) -> None:
    def a(seed: int) -> torch.Tensor:
        return torch.cat(
            [p.flatten() for name, p in attach_(make(), 4, 8, seed=seed).named_parameters() if "lora_A" in name]
        ).detach()

    model, state = make(), torch.random.get_rng_state()
    attach_(model, 4, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = a(1)
    assert torch.equal(first, a(1)) and not torch.equal(first, a(2))
    assert first.abs().max() <= 32**-0.5  # kaiming-uniform with a = sqrt 5 is uniform in +-1/sqrt(in)
    assert first.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)


def test_unknown_targets_name_the_nearest(make: Make) -> None:
    with pytest.raises(RecipeError, match="'qproj'; did you mean 'q_proj'"):
        attach_(make(), 4, 8, targets=("qproj",))
    with pytest.raises(RecipeError, match="'lm_head'"):
        attach_(make(), 4, 8, targets=("lm_head",))
    with pytest.raises(RecipeError, match="rank=0"):
        attach_(make(), 0, 8)


def test_merging_equals_the_adapted_model_and_peft(make: Make) -> None:
    model = uneven(make())
    names = [name for name, _ in model.named_parameters()]
    adapted = trained(attach_(model, rank=4, alpha=8))
    assert sum(p.requires_grad for p in adapted.parameters()) == 2 * 2 * 2  # the layer without attention has none
    reference = copy.deepcopy(adapted).merge_and_unload()
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    merged = merge_(adapted)
    assert type(merged) is LlamaForCausalLM and [name for name, _ in merged.named_parameters()] == names
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(merged.parameters(), reference.parameters(), strict=True))
    with torch.no_grad():
        assert (merged(input_ids=IDS).logits - expected).abs().max() < 1e-5


def test_adapters_go_where_other_families_hold_the_same() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for model, names in (
        (
            GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=32)),
            "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        ),
        (Phi3ForCausalLM(Phi3Config(**sizes, intermediate_size=24)), "qkv_proj o_proj gate_up_proj down_proj"),
        (
            OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16)),
            "q_proj k_proj v_proj out_proj fc1 fc2",
        ),
    ):
        adapted = trained(attach_(model, rank=4, alpha=8, targets=every))
        found = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
        assert all(any(one.endswith(f".{name}") for one in found) for name in names.split()) and len(found) == len(
            names.split()
        )
        reference = copy.deepcopy(adapted).merge_and_unload()
        if isinstance(model, GPT2LMHeadModel):
            with pytest.raises(RecipeError, match="is a Conv1D, whose units cannot be scored by adapters"):
                adapter_parameters(adapted)
        merged = merge_(adapted)
        assert all((p - q).abs().max() < 1e-6 for p, q in zip(merged.parameters(), reference.parameters(), strict=True))


def test_merging_into_bfloat16_rounds_once(make: Make) -> None:
    """The float32 sum, rounded; peft's own merge agrees to the bit."""
    model = make().to(torch.bfloat16)
    base = model.model.layers[0].self_attn.q_proj.weight.detach().float()
    adapted = trained(attach_(model, rank=4, alpha=2))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    exact = (base + 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).to(torch.bfloat16)
    reference = copy.deepcopy(adapted).merge_and_unload().model.layers[0].self_attn.q_proj.weight
    merged = merge_(adapted).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact) and torch.equal(merged, reference)


def test_merging_refuses_what_is_not_finite_and_changes_nothing(make: Make) -> None:
    adapted = trained(attach_(make(), rank=4, alpha=8))
    base = adapted.get_base_model()
    before = base.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with torch.no_grad():
        base.model.layers[2].self_attn.v_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"layers\.2\.self_attn\.v_proj\.weight NaN"):
        merge_(adapted)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.base_layer.weight, before)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # peft's own loading asks by the old name
def test_a_saved_adapter_is_read_back_by_peft(make: Make, tmp_path: Path) -> None:
    adapted = trained(attach_(uneven(make()), rank=4, alpha=8))
    save_adapter(adapted, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 8 and json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        again = PeftModel.from_pretrained(uneven(make()), str(tmp_path))
        assert torch.equal(again(input_ids=IDS).logits, expected)


def test_a_target_that_left_every_layer_is_said_and_skipped(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    layers = len(arch_for(model.config).blocks(model))
    gone = Plan({f"layers.{i}.channels": () for i in range(layers)} | {"mlp": ()})
    shrink_(model, arch_for(model.config).axes(model), gone)
    adapted = attach_(model, 2, 4, ("q_proj", "gate_proj", "down_proj"))
    assert "no layer has gate_proj, down_proj any more" in caplog.text
    assert {name.split(".")[-2] for name in adapter_parameters(adapted)} == {"q_proj"}
    model = merge_(adapted)
    for targets, strict in ((("up_proj",), False), (("q_proj", "up_proj"), True)):
        with pytest.raises(RecipeError, match="keep more"):
            attach_(model, 2, 4, targets, strict=strict)


def test_a_model_whose_linears_all_left_says_so() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(RecipeError, match="the budget removed them all; keep more"):
        attach_(model, 2, 4.0, ("q_proj",))


def test_under_autocast_adapters_compute_what_peft_does_without_widening_what_they_read(make: Make) -> None:
    """The oracle is peft's own cast to float32, which autocast takes back at once."""
    found: list[list[torch.Tensor]] = []
    for own in (False, True):
        adapted = trained(attach_(make().to(torch.bfloat16), rank=4, alpha=8))
        for module in adapted.modules():
            if not own and "_cast_input_dtype" in vars(module):
                del module._cast_input_dtype
        read: list[torch.dtype] = []
        first = next(module for name, module in adapted.named_modules() if name.endswith("lora_A.default"))
        first.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert read == [torch.bfloat16 if own else torch.float32]
        found.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + 3 * 2 * 2
    assert all(torch.equal(peft, ours) for peft, ours in zip(*found, strict=True))


def test_without_autocast_adapters_still_widen_what_they_read(make: Make) -> None:
    adapted = trained(attach_(make().to(torch.bfloat16), rank=4, alpha=8))
    assert adapted(input_ids=IDS).logits.dtype == torch.bfloat16


def test_an_attention_of_compressed_vectors_is_adapted_on_what_stands_for_queries_keys_and_values() -> None:
    """DeepSeek's, which has no linears of those names; nothing left it."""
    model = AutoModelForCausalLM.from_config(FAMILIES["deepseek_v3"]())
    adapted = attach_(model, 2, 4, ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True)
    own = {name.split(".")[-2] for name in adapter_parameters(adapted)}
    assert {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} < own
    assert own & {"q_proj", "q_b_proj"}
    with pytest.raises(RecipeError, match="did you mean 'router'"):
        attach_(merge_(adapted), 2, 4, ("routerz",))
