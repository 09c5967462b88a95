"""Sensitivity against what it stands for: the change of a loss when an entry becomes 0, by finite differences."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind, Slice
from compresso.core.sensitivity import sensitivities


def test_it_is_the_change_of_the_loss_without_a_small_weight() -> None:
    """The spec's test e: correlation above .95 over small weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(4, (32,))

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(x), y)

    weight = model[0].weight
    assert isinstance(weight, torch.nn.Parameter)
    loss().backward()
    assert weight.grad is not None
    entries = Axis("entries", Kind.CHANNEL, weight.numel(), (Slice("w", 0),), (), "")
    found = sensitivities([entries], {"w": weight.flatten()}, {"w": weight.grad.flatten()})["entries"]
    small = [int(i) for i in weight.detach().flatten().abs().argsort()[:40]]
    changes: list[float] = []
    with torch.no_grad():
        before = loss()
        for i in small:
            kept = weight.view(-1)[i].clone()
            weight.view(-1)[i] = 0
            changes.append(float((loss() - before).abs()))
            weight.view(-1)[i] = kept
    assert float(torch.corrcoef(torch.stack([found[small], torch.tensor(changes)]))[0, 1]) > 0.95


def test_coupled_structures_share_one_score() -> None:
    """Of every axis the sum over units is the sum over the tensors that it tiles, each as often as it does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    kinds = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)
    axes = [axis for axis in arch_for(config).axes(model) if axis.kind in kinds]
    weights = {name: one.detach() for name, one in model.named_parameters()}
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    found = sensitivities(axes, weights, gradients)
    assert found.keys() == {axis.name for axis in axes}
    for axis in axes:
        owned = {piece.param for piece in axis.slices}
        expected = sum(float((weights[name] * gradients[name]).abs().sum()) for name in owned)
        assert float(found[axis.name].sum()) == pytest.approx(expected, rel=1e-5)
    channels = next(axis for axis in axes if axis.kind == Kind.CHANNEL)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    gate = "model.layers.0.mlp.gate_proj.weight"
    by_hand = sum((weights[name] * gradients[name]).abs().sum(1) for name in (gate, up))
    by_hand = by_hand + (weights[down] * gradients[down]).abs().sum(0)
    torch.testing.assert_close(found[channels.name], by_hand.double(), rtol=1e-5, atol=0)


def test_what_has_no_gradient_counts_for_nothing() -> None:
    axis = Axis("a", Kind.CHANNEL, 3, (Slice("w", 0),), (), "")
    assert sensitivities([axis], {"w": torch.ones(3)}, {})["a"].tolist() == [0, 0, 0]
