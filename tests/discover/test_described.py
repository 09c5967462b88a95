"""The law that makes discovery trustworthy: on every architecture somebody described, it finds the described axes and
no others.

But for the tokens: they are looked up by number, which a trace of shapes cannot follow. Nor can it follow tokens to
their experts, so mixtures are described and not traced.
"""

import pytest
import torch
from tests.arch.conftest import CONFIGS, MIXTURES, build
from transformers import AutoModelForCausalLM, LlamaConfig

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.discover.axes import discover
from compresso.errors import ArchError


def facts(axes: tuple[Axis, ...]) -> set[tuple[object, ...]]:
    return {
        (a.kind, a.size, tuple(sorted((s.param, s.dim, s.width, -1 if s.unit is None else s.unit) for s in a.slices)))
        for a in axes
        if a.kind != Kind.VOCAB
    }


OUTSIDE = {
    "opt_post_norm": {"model.decoder.channels"},
    "bert_classifier": {"channels"},
    "roberta_classifier": {"classifier.channels"},
}
"""Axes that lie outside the layers and that descriptions leave alone:
OPT-350m's narrower embedding, BERT's pooler, and the first linear of RoBERTa's classifier.
"""


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(MIXTURES)))
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_discovered_axes_are_the_described_ones(name: str, attention: str) -> None:
    with torch.device("meta"):
        model = build(name, attention)
    found = discover(model).axes
    # a trace does not know that norms may take their statistics over what is left
    described = tuple(axis for axis in arch_for(model.config).axes(model) if not axis.layer_norms)
    discovered = tuple(axis for axis in found if axis.name not in OUTSIDE.get(name, ()))
    assert len(found) - len(discovered) == len(OUTSIDE.get(name, ()))
    assert facts(discovered) == facts(described)
    by_name = {axis.name: axis for axis in described if axis.kind != Kind.VOCAB}
    assert {axis.name for axis in discovered} == set(by_name)
    for axis in discovered:
        assert (axis.container, axis.layer) == (by_name[axis.name].container, by_name[axis.name].layer)
        assert set(axis.norms) == set(by_name[axis.name].norms)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_not_traced_and_say_so(name: str) -> None:
    with torch.device("meta"):
        model = build(name, "sdpa")
    with pytest.raises(ArchError, match=r"layers\.\d\.(mlp\.experts cannot be traced|self_attn .* describe this)"):
        discover(model)


def test_heads_that_share_one_key_are_one_unit() -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert facts(discover(model).axes) == facts(arch_for(config).axes(model))


def test_the_vocabulary_and_shared_norms_stay_with_a_reason() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    reasons = {fixed.sources[0]: str(fixed) for fixed in discover(model).fixed}
    assert "looked up by number" in reasons["model.embed_tokens.weight", 0]
    assert "all units share it" in reasons["model.layers.0.self_attn.q_norm.weight", 0]


def test_the_model_is_left_as_it_was() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama_gqa_tied"]()).train()
    model.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    discover(model)
    assert model.training and not model.model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
