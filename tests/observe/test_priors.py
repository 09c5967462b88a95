"""Priors of units: Wanda's against the formula written out, on linears whichever way round they store their weight."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.observe.priors import priors


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            vocab_size=20,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=16, n_inner=24, vocab_size=20, bos_token_id=1, eos_token_id=1
        )
    )


@pytest.mark.parametrize(
    ("make", "linears"),
    [
        (llama, {"heads": "model.layers.1.self_attn.o_proj", "channels": "model.layers.1.mlp.down_proj"}),
        (gpt2, {"heads": "transformer.h.1.attn.c_proj", "channels": "transformer.h.1.mlp.c_proj"}),
    ],
)
def test_scores_are_the_mean_of_magnitude_times_scale_over_a_unit_s_entries(
    make: Callable[[], PreTrainedModel], linears: dict[str, str]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        ids = torch.randint(3, 20, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    kinds = (Kind.HEAD, Kind.CHANNEL)
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind in kinds]
    batch = {"input_ids": ids, "attention_mask": mask}
    found = priors("wanda", model, axes, [batch, batch], 0)
    for what, name in linears.items():
        seen: list[Tensor] = []
        linear = model.get_submodule(name)
        handle = linear.register_forward_pre_hook(lambda _, given, into=seen: into.append(given[0].detach()))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        stored = model.get_parameter(f"{name}.weight").detach()
        weight = stored if make is llama else stored.T
        rms = seen[0][mask.bool()].double().square().mean(dim=0).sqrt()
        columns = (weight.double().abs() * rms).mean(dim=0)
        axis = next(axis for axis in axes if axis.name == f"layers.1.{what}")
        torch.testing.assert_close(found[axis.name], columns.reshape(axis.size, -1).mean(dim=1))


def test_a_dead_unit_has_the_lowest_prior_but_chance_knows_nothing_of_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama().eval()
        ids = torch.randint(3, 20, (2, 9))
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[5] = 0
        model.get_parameter("model.layers.0.self_attn.v_proj.weight")[4:] = 0
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.name in ("layers.0.heads", "layers.0.channels")]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("wanda", "magnitude"):
        found = priors(name, model, axes, [batch], 0)
        assert [int(found[axis.name].argmin()) for axis in axes] == [1, 5]
        assert all(float(score.min()) == 0 for score in found.values())
    one, other = (priors("random", model, axes, [], seed) for seed in (0, 1))
    assert not torch.equal(one["layers.0.channels"], other["layers.0.channels"])
    assert one.keys() == {axis.name for axis in axes}


@pytest.mark.parametrize("prior", ["wanda", "magnitude"])
def test_a_query_head_has_its_part_of_its_key_value_heads_prior(prior: Literal["wanda", "magnitude"]) -> None:
    """Wanda's is a mean over entries, that of activations a norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama().eval()
        ids = torch.randint(3, 20, (2, 9))
    arch = arch_for(model.config)
    axes = [axis for axis in axes_of(arch, model, (Kind.QUERY,)) if axis.kind in (Kind.HEAD, Kind.QUERY)]
    found = priors(prior, model, axes, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 0)
    for i in range(2):
        parts = torch.stack([found[f"layers.{i}.heads.{g}.queries"] for g in range(2)])
        whole = parts.mean(dim=1) if prior == "wanda" else parts.square().sum(dim=1).sqrt()
        torch.testing.assert_close(found[f"layers.{i}.heads"], whole)
        assert len(parts.unique()) == 4
