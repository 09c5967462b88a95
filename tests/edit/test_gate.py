"""Masks in a context: what they refuse and leave behind, adapters, checkpointing. Equality with removal:
tests/arch/test_laws.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Axis
from compresso.edit.gate import gated
from compresso.edit.lora import attach_, merge_

Make = Callable[..., LlamaForCausalLM]
IDS = torch.arange(2, 16).reshape(2, 7)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def soft_masks(axes: tuple[Axis, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {axis.name: torch.empty(axis.size).uniform_(0.3, 1, generator=generator) for axis in axes if axis.gates}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"layers.0.head": torch.ones(2)}, r"no axis is named 'layers\.0\.head'; did you mean 'layers\.0\.heads'"),
        ({"layers.0.heads": torch.ones(3)}, r"layers\.0\.heads is torch\.float32 \[3\], wanted floating \[2\]"),
        ({"hidden": torch.ones(32, dtype=torch.long)}, r"hidden is torch\.int64"),
        ({"hidden": torch.ones(2, 1, 32)}, r"hidden is torch\.float32 \[2, 1, 32\]"),
        ({"hidden": torch.ones(2, 32), "layers": torch.ones(4, 3)}, "hidden has 2 rows, layers has 4 rows"),
    ],
)
def test_refusals_leave_no_hooks(make: Make, masks: dict[str, Tensor], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message), gated(model, arch_for(model.config).axes(model), masks):
        pass
    assert hooks(model) == 0


def test_hooks_leave_with_the_context_and_after_an_error(make: Make) -> None:
    model = make()
    axes = arch_for(model.config).axes(model)
    masks = soft_masks(axes)
    with gated(model, axes, masks):
        assert (
            hooks(model) == 1 + 3 * 5
        )  # one a site, however many axes meet there: embedding; o (in, out), gate, up, down
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="inside"), gated(model, axes, masks):
        raise RuntimeError("inside")
    assert hooks(model) == 0


def compresso_forward(model: LlamaForCausalLM, ids: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The masked forward written out from the method's description (arXiv 2310.05015 and its code), with nothing of
    this package.
    """
    config, decoder = model.config, model.model
    width, heads, groups = (
        config.head_dim,
        config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight, torch.arange(ids.shape[1])[None])

    def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
        return module.weight * x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / config.hidden_size + config.rms_norm_eps)

    def rotate(x: Tensor) -> Tensor:
        return x * cos[:, None] + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1) * sin[:, None]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    h = decoder.embed_tokens(ids) * masks["hidden"]
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for i, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        x = norm(h, layer.input_layernorm)
        q, k, v = rotate(split(attention.q_proj(x))), rotate(split(attention.k_proj(x))), split(attention.v_proj(x))
        heard: list[Tensor] = []
        for head in range(heads):
            scores = (q[:, head] @ k[:, head // groups].transpose(1, 2) / width**0.5).masked_fill(future, -torch.inf)
            heard.append(scores.softmax(-1) @ v[:, head // groups] * masks[f"layers.{i}.heads"][head // groups])
        h = (
            h
            + attention.o_proj(torch.cat(heard, dim=-1)) * masks["hidden"] * masks["attention"][i] * masks["layers"][i]
        )
        x = norm(h, layer.post_attention_layernorm)
        z = masks[f"layers.{i}.channels"]
        x = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x) * z) * (mlp.up_proj(x) * z))
        h = h + x * masks["hidden"] * masks["mlp"][i] * masks["layers"][i]
    return norm(h, decoder.norm) @ model.lm_head.weight.T


def test_masks_act_where_the_method_puts_them(make: Make) -> None:
    model = make()
    axes = arch_for(model.config).axes(model)
    masks = soft_masks(axes)
    with torch.no_grad(), gated(model, axes, masks):
        logits = model(input_ids=IDS).logits
    with torch.no_grad():
        assert (logits - compresso_forward(model, IDS, masks)).abs().max() < 1e-5


def test_masks_of_any_float_type_keep_the_activations_type(make: Make) -> None:
    model = make()
    axes = arch_for(model.config).axes(model)
    with torch.no_grad():
        for model_type in (torch.float32, torch.bfloat16):
            model.to(model_type)
            for mask_type in (torch.float64, torch.bfloat16):
                with gated(model, axes, {name: mask.to(mask_type) for name, mask in soft_masks(axes).items()}):
                    assert model(input_ids=IDS).logits.dtype == model_type


def test_gates_on_adapted_linears_equal_gates_on_merged_ones(make: Make) -> None:
    """The adapters sit on gated linears too, so a hook that missed the adapter's branch would show."""
    model = make()
    axes = arch_for(model.config).axes(model)
    masks = soft_masks(axes)
    adapted = attach_(model, rank=4, alpha=8, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
        results: list[Tensor] = []
        for wrapped in (adapted, adapted.get_base_model()):
            with gated(wrapped, axes, masks):
                results.append(adapted(input_ids=IDS).logits)
        merged = merge_(adapted)
        with gated(merged, axes, masks):
            expected = merged(input_ids=IDS).logits
    assert torch.equal(results[0], results[1])
    assert (results[0] - expected).abs().max() < 1e-5


def test_training_adapters_and_masks_leaves_the_base_bit_identical(make: Make) -> None:
    model = make().train()
    axes = arch_for(model.config).axes(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masks = {name: mask.requires_grad_() for name, mask in soft_masks(axes).items()}
    start = {name: mask.detach().clone() for name, mask in masks.items()}
    adapted = attach_(model, rank=2, alpha=2)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*adapters, *masks.values()], lr=0.05)
    for _ in range(5):
        with gated(adapted, axes, masks):
            adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(adapted.unload().named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all((masks[name] != start[name]).any() for name in masks)
    assert all(parameter.abs().sum() > 0 for parameter in adapters)


def test_backward_outside_the_context_is_noticed_under_checkpointing(make: Make) -> None:
    model = make().train()
    axes = arch_for(model.config).axes(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with gated(model, axes, soft_masks(axes)):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with pytest.raises(CheckpointError):
        loss.backward()
