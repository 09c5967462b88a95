"""What shrinking does to parameters, fields and types, and what it refuses. Equality with masking is in
tests/arch/test_laws.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.lora import attach_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, NumericError

Make = Callable[..., LlamaForCausalLM]
IDS = torch.arange(2, 9)[None]


def test_the_norms_numbers() -> None:
    """4096 -> 4088 dimensions: weight by 1.000978, eps by 1.001957 (arithmetic)."""
    with torch.device("meta"):
        sizes = {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "vocab_size": 4,
        }
        model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-6))
    model.model.norm.weight = torch.nn.Parameter(torch.ones(4096))
    shrink_(model, arch_for(model.config).axes(model), Plan({"hidden": tuple(range(4088))}))
    assert float(model.model.norm.weight[0].detach()) == pytest.approx(1.000978, abs=1e-6)
    assert model.model.norm.variance_epsilon == pytest.approx(1.001957e-6, rel=1e-6)
    assert isinstance(model.model.norm.variance_epsilon, float)


@pytest.mark.parametrize(
    ("plan", "soft", "message"),
    [
        (Plan({"layers.9.heads": (0,)}), {}, "layers.9.heads"),
        (Plan({"hidden": ()}), {}, "hidden with 0 of 32"),
        (Plan({"layers.0.heads": (1, 0)}), {}, "ascending"),
        (Plan(), {"hidden": torch.ones(31)}, r"'hidden' \[31\]"),
        (Plan(), {"hidden": torch.full((32,), float("nan"))}, "not finite"),
        (Plan(), {"layers.1.channels": -torch.ones(48)}, "negative"),
    ],
)
def test_refusals_change_nothing(make: Make, plan: Plan, soft: dict[str, Tensor], message: str) -> None:
    model = make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ArchError, match=message):
        shrink_(model, arch_for(model.config).axes(model), plan, soft)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_stale_axes_and_adapters_are_refused(make: Make) -> None:
    model = make()
    arch = arch_for(model.config)
    axes = arch.axes(model)
    plan = Plan({"layers.0.channels": (1, 2)})
    shrink_(model, axes, plan)
    with pytest.raises(ArchError, match=r"layers\.0\.channels does not fit"):
        shrink_(model, axes, plan)
    axes = arch.axes(model)
    attach_(model, rank=2, alpha=2)
    with pytest.raises(ArchError, match="without adapters"):
        shrink_(model, axes, Plan({"layers.1.channels": (1, 2)}))
    with pytest.raises(ArchError, match="merge adapters"):
        arch.axes(model)


def test_parameters_keep_what_is_not_their_shape(make: Make) -> None:
    model = make().to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    untouched = model.model.layers[1].mlp.up_proj.weight
    axes = arch_for(model.config).axes(model)
    shrink_(
        model, axes, Plan({"layers.0.channels": tuple(range(0, 48, 2))}), {"layers.0.channels": torch.full((48,), 0.5)}
    )
    up, gate = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    assert (up.weight.requires_grad, gate.weight.requires_grad, up.weight.dtype) == (False, True, torch.bfloat16)
    assert (up.out_features, up.in_features) == (24, 32)
    assert model.model.layers[1].mlp.up_proj.weight is untouched
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_stays_tied_and_exact(make: Make) -> None:
    model = make()
    axes = arch_for(model.config).axes(model)
    hidden = torch.linspace(0.1, 1, 32)
    hidden[::5] = 0
    with torch.no_grad(), gated(model, axes, {"hidden": hidden}):
        expected = model(input_ids=IDS).logits
    shrink_(model, axes, Plan({"hidden": tuple(hidden.nonzero().flatten().tolist())}), {"hidden": hidden})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.in_features, model.model.embed_tokens.embedding_dim) == (25, 25)
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - expected).abs().max() < 1e-5


def test_a_kept_unit_with_mask_zero_is_folded_to_zero(make: Make) -> None:
    """Plans that round widths up re-admit such units; the tied head's division must not divide by them."""
    model = make()
    axes = arch_for(model.config).axes(model)
    soft = {
        axis.name: torch.full((axis.size,), 0.5)
        for axis in axes
        if axis.name in ("hidden", "layers.1.heads", "layers.0.channels")
    }
    for mask in soft.values():
        mask[1] = 0
    with torch.no_grad(), gated(model, axes, soft):
        expected = model(input_ids=IDS).logits
    shrink_(model, axes, Plan(), soft)
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - expected).abs().max() < 1e-5


def test_an_overflow_while_folding_is_an_error(make: Make) -> None:
    model = make().to(torch.float16)
    axes = arch_for(model.config).axes(model)
    with pytest.raises(NumericError, match=r"model\.norm\.weight overflows torch\.float16"):
        shrink_(model, axes, Plan(), {"hidden": torch.full((32,), 1e-6)})


def test_layers_are_renumbered_without_cache_holes(make: Make) -> None:
    model = make(num_hidden_layers=5)
    shrink_(
        model,
        arch_for(model.config).axes(model),
        Plan({"layers": (0, 2, 3, 4), "layers.0.heads": (), "layers.3.heads": ()}),
    )
    assert [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers] == [None, 0, None, 1]
    assert model.config.num_hidden_layers == len(model.model.layers) == 4


def test_a_model_without_any_attention_or_ffn_still_runs(make: Make) -> None:
    model = make()
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan({"attention": (), "mlp": ()}))
    assert {name for name, _ in model.named_parameters()} == {"model.embed_tokens.weight", "model.norm.weight"}
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False).shape == (1, 10)
