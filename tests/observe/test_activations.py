"""Activation scores against the formulas written out, dead and identical parts planted, and any batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.errors import ArchError, NumericError
from compresso.observe.activations import SCORED, activation_scores

LENGTHS = (9, 5, 7, 9, 3, 8, 9, 6)


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Three layers, two key/value heads with two query heads each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            initializer_range=0.4,
        )
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def axes_of(model: LlamaForCausalLM) -> list[Axis]:
    return [axis for axis in arch_for(model.config).axes(model) if axis.kind in SCORED]


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (length,), generator=generator) for length in LENGTHS]


def batches(size: int) -> Iterator[dict[str, Tensor]]:
    """The examples, `size` at a time, filled up to ten tokens with token 7."""
    rows = examples()
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield {
            "input_ids": torch.stack([functional.pad(row, (0, 10 - len(row)), value=7) for row in some]),
            "attention_mask": torch.stack([functional.pad(torch.ones_like(row), (0, 10 - len(row))) for row in some]),
        }


def scores(model: LlamaForCausalLM, size: int = 3, **how: Any) -> dict[str, Tensor]:
    return activation_scores(model, axes_of(model), list(model.model.layers), batches(size), **how)


def seen(model: LlamaForCausalLM) -> list[dict[str, Tensor]]:
    """Every example alone, without padding:
    what each module gets ("module<") and gives ("module>"), [tokens, width].
    """
    found: list[dict[str, Tensor]] = []
    for row in examples():
        here: dict[str, Tensor] = {}

        def keep(name: str, here: dict[str, Tensor] = here) -> Any:
            def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
                if inputs and isinstance(inputs[0], Tensor):
                    here[name + "<"] = inputs[0][0].double()
                here[name + ">"] = output[0].double() if isinstance(output, Tensor) else torch.zeros(0)

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in model.model.named_modules()]
        with torch.no_grad():
            model.model(row.unsqueeze(0), use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(here)
    return found


def test_scores_are_the_formulas_written_out(model: LlamaForCausalLM) -> None:
    found, runs = scores(model), seen(model)

    def l2_of_means(name: str) -> Tensor:
        return torch.stack([run[name].abs().mean(dim=0) for run in runs]).square().sum(dim=0).sqrt()

    for i in range(3):
        torch.testing.assert_close(
            found[f"layers.{i}.channels"], l2_of_means(f"layers.{i}.mlp.down_proj<"), rtol=1e-4, atol=1e-6
        )
        heads = l2_of_means(f"layers.{i}.self_attn.o_proj<").reshape(2, 8).norm(dim=1)
        torch.testing.assert_close(found[f"layers.{i}.heads"], heads, rtol=1e-4, atol=1e-6)
    norms = [f"layers.{i}.{name}>" for i in range(3) for name in ("input_layernorm", "post_attention_layernorm")]
    torch.testing.assert_close(
        found["hidden"], torch.stack([l2_of_means(name) for name in norms]).sum(dim=0), rtol=1e-4, atol=1e-6
    )
    for i in range(3):
        turns = torch.cat(
            [1 - functional.cosine_similarity(run[f"layers.{i}<"], run[f"layers.{i}>"], dim=-1) for run in runs]
        )
        assert found["layers"][i].item() == pytest.approx(turns.mean().item(), rel=1e-4)


@pytest.mark.parametrize("over_tokens", ["mean", "l2", "variance"])
@pytest.mark.parametrize("over_examples", ["mean", "l2", "variance"])
def test_every_aggregation_is_what_it_is_called(model: LlamaForCausalLM, over_tokens: str, over_examples: str) -> None:
    runs = [run["layers.1.mlp.down_proj<"] for run in seen(model)]
    of: Mapping[str, Any] = {
        "mean": lambda values: values.abs().mean(dim=0),
        "l2": lambda values: values.norm(dim=0),
        "variance": lambda values: values.var(dim=0, unbiased=False),
    }
    wanted = of[over_examples](torch.stack([of[over_tokens](run) for run in runs]))
    found = scores(model, over_tokens=over_tokens, over_examples=over_examples)["layers.1.channels"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


def test_batch_size_and_padding_change_nothing(model: LlamaForCausalLM) -> None:
    alone = scores(model, 1)
    for size in (2, 8):
        for name, score in scores(model, size).items():
            torch.testing.assert_close(score, alone[name], rtol=1e-5, atol=1e-7, msg=name)


@torch.no_grad()
def test_dead_units_score_zero_and_a_layer_that_does_nothing_comes_last(model: LlamaForCausalLM) -> None:
    first, second = model.model.layers[0], model.model.layers[1]
    first.mlp.up_proj.weight[[3, 5]] = 0
    first.self_attn.v_proj.weight[4:] = 0  # the second key/value head
    second.self_attn.o_proj.weight.zero_()
    second.mlp.down_proj.weight.zero_()
    gone = [2, 11]
    model.model.embed_tokens.weight[:, gone] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[gone] = 0
        layer.mlp.down_proj.weight[gone] = 0
    found = scores(model)
    assert (found["layers.0.channels"] == 0).nonzero().flatten().tolist() == [3, 5]
    assert (found["layers.0.heads"] == 0).tolist() == [False, True]
    assert (found["hidden"] == 0).nonzero().flatten().tolist() == gone
    assert found["layers"][1].abs() < 1e-6
    assert (found["layers"][[0, 2]] > 1e-3).all()


@torch.no_grad()
def test_the_one_active_key_value_head_comes_first(model: LlamaForCausalLM) -> None:
    """Its query heads lie side by side; scores that read them in strides would mix heads of different groups."""
    for active in (0, 1):
        other = slice(4, 8) if active == 0 else slice(0, 4)
        kept = model.model.layers[2].self_attn.v_proj.weight.clone()
        model.model.layers[2].self_attn.v_proj.weight[other] = 0
        found = scores(model)["layers.2.heads"]
        assert (found > 0).nonzero().flatten().tolist() == [active]
        model.model.layers[2].self_attn.v_proj.weight.copy_(kept)


def test_nothing_is_left_on_the_model(model: LlamaForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_has_no_score_is_refused(model: LlamaForCausalLM) -> None:
    mlp = [axis for axis in arch_for(model.config).axes(model) if axis.kind == Kind.MLP]
    with pytest.raises(ArchError, match="'mlp' have no activation score"):
        activation_scores(model, mlp, list(model.model.layers), batches(2))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericError, match=r"layer 0 outputs NaN or Inf"):
        scores(model)
