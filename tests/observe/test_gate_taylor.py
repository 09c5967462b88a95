"""Gate-Taylor scores against gradients taken one example at a time,
and against what dimming a gate does to the loss.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Axis
from compresso.core.loss import NEXT_TOKEN
from compresso.edit.gate import gated
from compresso.errors import NumericError
from compresso.observe.gate_taylor import gate_taylor


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        pad_token_id=0,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return made


def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):  # examples of different length, padded on the right, part of each not labelled
        mask[row, 9 - row :] = 0
        labels[row, 9 - row :] = -100
        labels[row, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def axes_of(model: PreTrainedModel) -> list[Axis]:
    return [axis for axis in arch_for(model.config).axes(model) if axis.kind in ("head", "channel", "hidden")]


def test_scores_are_the_mean_square_of_each_examples_own_gradient(model: PreTrainedModel) -> None:
    axes = axes_of(model)
    batches = [batch(3, 1), batch(2, 2)]
    scores = gate_taylor(model, axes, batches)
    by_hand = {axis.name: torch.zeros(axis.size) for axis in axes}
    for one in batches:
        for row in range(len(one["labels"])):
            masks = {axis.name: torch.ones(axis.size, requires_grad=True) for axis in axes}
            with gated(model, axes, masks):
                loss = NEXT_TOKEN(model, {name: value[row : row + 1] for name, value in one.items()})
            for name, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
                by_hand[name] += gradient.square() / 5
    for name, score in scores.items():
        assert score.max() > 1e-6
        torch.testing.assert_close(score, by_hand[name], rtol=1e-3, atol=1e-8)


def test_a_score_predicts_what_dimming_the_gate_does(model: PreTrainedModel) -> None:
    """For one example the score is the squared slope of the loss: a finite difference of a real forward pass."""
    axes = axes_of(model)
    one = {name: value[:1] for name, value in batch(2, 3).items()}
    double = model.double()
    scores = gate_taylor(double, axes, [one])
    for axis in axes[:3]:
        unit = int(scores[axis.name].argmax())
        losses = []
        for value in (0.99, 1.01):
            mask = torch.ones(axis.size, dtype=torch.float64)
            mask[unit] = value
            with torch.no_grad(), gated(double, axes, {axis.name: mask}):
                losses.append(float(NEXT_TOKEN(double, one)))
        slope = (losses[1] - losses[0]) / 0.02
        assert float(scores[axis.name][unit]) == pytest.approx(slope**2, rel=5e-2)
    model.float()


def test_weights_are_not_differentiated_and_come_back_trainable(model: PreTrainedModel) -> None:
    gate_taylor(model, axes_of(model), [batch(2, 4)])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_overflowing_model_is_named(model: PreTrainedModel) -> None:
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    with pytest.raises(NumericError, match="layer 1 outputs NaN or Inf"):
        gate_taylor(model, axes_of(model), [batch(2, 5)])
    with torch.no_grad():
        weight.copy_(before)
