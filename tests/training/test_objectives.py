"""The gated objective: when gates act, what they are drawn from, and the layer gates that switch pruning off."""

from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core import hard_concrete
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.gates import Gates
from compresso.core.loss import NEXT_TOKEN
from compresso.edit.lora import attach_
from compresso.solve.constraint import CountsPerLayer, ShareOfModel
from compresso.training.objectives import GatedObjective
from compresso.training.order import Micro


def objective(
    *,
    starts: int = 0,
    noise: Literal["batch", "example"] = "batch",
    layer_gates: Literal["none", "layer", "sublayer"] = "none",
    lagrangian: bool = True,
    cost_aware: bool = False,
    per_layer: bool = False,
) -> GatedObjective:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=50, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    arch = arch_for(config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    gated_axes = [axis for axis in axes if axis.kind in ("head", "channel")]
    gates = Gates(gated_axes, {axis.name: torch.linspace(-2, 1, axis.size) for axis in gated_axes})
    return GatedObjective(
        attach_(model, 4, 4.0),
        gates,
        CountsPerLayer(gated_axes, {Kind.HEAD: 2, Kind.CHANNEL: 12}, cost) if per_layer else ShareOfModel(cost, 0.5),
        loss=NEXT_TOKEN,
        starts=starts,
        progress=lambda k: min(1.0, k / 10),
        use_lagrangian=lagrangian,
        noise=noise,
        seed=3,
        layer_gates=layer_gates,
        cost_aware=cost_aware,
    )


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_before_pruning_begins_the_model_is_dense_and_gates_get_no_gradient() -> None:
    """Compresso's first epoch trains LoRA alone; a gate without gradient keeps AdamW's state for later."""
    one = objective(starts=5)
    with one.attached():
        out = one(batch(), Micro(4, 0, range(4)))
        out["loss"].backward()
    assert set(out) == {"loss"}
    assert out["loss"].item() == pytest.approx(NEXT_TOKEN(one.model, batch()).item(), abs=1e-6)
    assert one.gates.log_alpha.grad is None
    assert all(p.grad is None for p in one.multipliers())


def test_from_then_on_gates_and_multipliers_learn_and_base_weights_do_not() -> None:
    one = objective(starts=5)
    with one.attached():
        out = one(batch(), Micro(9, 0, range(4)))
        out["loss"].backward()
    assert {"loss", "language", "sparsity", "target"} <= set(out)
    assert one.gates.log_alpha.grad is not None
    assert one.gates.log_alpha.grad.abs().sum() > 0
    for name, parameter in one.model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
    gap = (out["sparsity"] - out["target"]).item()
    assert one.lambda1 is not None
    assert one.lambda2 is not None
    assert one.lambda1.grad is not None
    assert one.lambda2.grad is not None
    assert one.lambda1.grad.item() == pytest.approx(gap, abs=1e-5)  # d/d lambda1 of the Lagrangian, closed form
    assert one.lambda2.grad.item() == pytest.approx(gap**2, abs=1e-5)
    assert out["target"].item() == pytest.approx(0.5 * 0.4)


def test_layers_of_a_kind_share_multipliers_of_their_mean_penalty() -> None:
    """By hand: each kind adds the mean over layers of lambda1 gap + lambda2 gap^2, whatever the depth."""
    one = objective(per_layer=True)
    assert one.lambda1 is not None and one.lambda2 is not None
    with torch.no_grad():
        one.gates.log_alpha[: len(one.gates) // 2] -= 1.5  # so that the layers' gaps differ
        one.lambda1.copy_(torch.tensor([3.0, -2.0]))
        one.lambda2.copy_(torch.tensor([5.0, 7.0]))
    with one.attached():
        out = one(batch(), Micro(10, 0, range(4)))
        out["loss"].backward()
    assert one.lambda1.grad is not None and one.lambda2.grad is not None
    probabilities, penalty = one.gates.keep_probabilities(), 0.0
    for term, (kind, wanted) in enumerate(((Kind.CHANNEL, 0.5), (Kind.HEAD, 0.5))):
        axes = [axis for axis in one.gates.axes if axis.kind == kind]
        gaps = [1 - probabilities[axis.name].mean().item() - wanted for axis in axes]
        mean, mean_of_squares = sum(gaps) / 2, sum(gap**2 for gap in gaps) / 2
        assert len(gaps) == 2 and abs(gaps[0] - gaps[1]) > 0.1
        assert one.lambda1.grad[term].item() == pytest.approx(mean, abs=1e-6)
        assert one.lambda2.grad[term].item() == pytest.approx(mean_of_squares, abs=1e-6)
        penalty += one.lambda1[term].item() * mean + one.lambda2[term].item() * mean_of_squares
    assert (out["loss"] - out["language"]).item() == pytest.approx(penalty, abs=1e-5)


def test_one_draw_serves_all_micro_batches_of_an_update_and_the_next_update_draws_anew() -> None:
    one = objective(noise="batch")
    with one.attached():
        same = [one(batch(), Micro(7, slot, range(4 * slot, 4 * slot + 4)))["language"].item() for slot in (0, 1)]
        other = one(batch(), Micro(8, 0, range(4)))["language"].item()
    assert same[0] == same[1]
    assert same[0] != other


def test_an_examples_noise_does_not_depend_on_how_the_batch_is_split() -> None:
    one = objective(noise="example")
    whole, parts = batch(4), []
    with one.attached():
        together = one(whole, Micro(7, 0, range(4)))["language"].item()
        for start in (0, 2):
            half = {name: value[start : start + 2] for name, value in whole.items()}
            parts.append(one(half, Micro(7, start // 2, range(start, start + 2)))["language"].item())
    assert together == pytest.approx(sum(parts) / 2, abs=1e-5)


@pytest.mark.parametrize("how", ["layer", "sublayer"])
def test_closed_layer_gates_leave_the_model_dense_whatever_its_unit_masks(how: Literal["layer", "sublayer"]) -> None:
    one = objective(layer_gates=how)
    assert one.layer_alpha is not None
    assert len(one.layer_alpha) == (2 if how == "layer" else 4)
    with torch.no_grad():
        one.layer_alpha.fill_(-100.0)
    with one.attached():
        loss = one(batch(), Micro(0, 0, range(4)))["language"].item()
    assert loss == pytest.approx(NEXT_TOKEN(one.model, batch()).item(), abs=1e-6)
    assert one.constraint.sparsity(one.keep_probabilities()).item() == pytest.approx(0, abs=1e-4)
    assert all((value > 50).all() for value in one.final_values().values())


@pytest.mark.parametrize("how", ["layer", "sublayer"])
def test_layer_gates_start_closed_so_that_training_starts_dense(how: Literal["layer", "sublayer"]) -> None:
    one = objective(layer_gates=how)
    assert one.layer_alpha is not None
    torch.testing.assert_close(one.layer_alpha.detach(), torch.full_like(one.layer_alpha, hard_concrete.LOG_ALPHA_LOW))
    assert one.constraint.sparsity(one.keep_probabilities()).item() == pytest.approx(0, abs=1e-6)
    assert all((value > 50).all() for value in one.final_values().values())


def test_clamping_holds_unit_and_layer_gates_in_the_published_range() -> None:
    one = objective(layer_gates="layer")
    with torch.no_grad():
        for parameter in one.gate_parameters():
            parameter.copy_(torch.linspace(-50, 50, len(parameter)))
    one.clamp_()
    for parameter in one.gate_parameters():
        assert parameter.min().item() == pytest.approx(hard_concrete.LOG_ALPHA_LOW)
        assert parameter.max().item() == pytest.approx(hard_concrete.LOG_ALPHA_HIGH)


def test_open_layer_gates_let_the_unit_masks_act() -> None:
    one, plain = objective(layer_gates="layer"), objective()
    assert one.layer_alpha is not None
    with torch.no_grad():
        one.layer_alpha.fill_(100.0)
    torch.testing.assert_close(one.keep_probabilities(), plain.keep_probabilities(), atol=1e-5, rtol=0)
    assert torch.equal(one.final_values()["layers.0.heads"], plain.final_values()["layers.0.heads"])


def test_projection_needs_no_multipliers() -> None:
    one = objective(lagrangian=False)
    assert one.multipliers() == []
    one.project_(10)
    assert one.constraint.sparsity(one.keep_probabilities()).item() == pytest.approx(0.5, abs=1e-6)


def test_using_it_without_the_hooks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="attached"):
        objective()(batch(), Micro(0, 0, range(4)))


def test_recomputed_activations_see_the_same_masks() -> None:
    """With checkpointing the forward pass runs again inside backward; gradients must be those without it."""
    gradients: list[Any] = []
    for checkpointing in (False, True):
        one = objective(noise="example")
        assert isinstance(one.model, PeftModel)
        if checkpointing:
            one.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            one.model.train()
        with one.attached():
            one(batch(), Micro(3, 0, range(4)))["loss"].backward()
        gradients.append(one.gates.log_alpha.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_charging_gates_for_their_cost_leaves_no_common_direction() -> None:
    """What remains of the gradient sums to zero: raising all gates together buys nothing, and dear gates pay more."""
    plain, charged = objective(lagrangian=False), objective(lagrangian=False, cost_aware=True)
    for one in (plain, charged):
        with one.attached():
            one(batch(), Micro(3, 0, range(4)))["loss"].backward()
    assert plain.gates.log_alpha.grad is not None
    assert charged.gates.log_alpha.grad is not None
    taken = plain.gates.log_alpha.grad - charged.gates.log_alpha.grad
    assert charged.gates.log_alpha.grad.sum().item() == pytest.approx(0, abs=1e-5)
    probabilities = plain.gates.keep_probabilities()
    slope = {name: (p * (1 - p)).detach() for name, p in probabilities.items()}
    price = {name: part / slope[name] for name, part in plain.gates.split(taken).items()}
    for name, values in price.items():
        torch.testing.assert_close(values, values[0].expand_as(values), rtol=1e-3, atol=0)  # one price a parameter
        assert values[0] / price["layers.0.channels"][0] == pytest.approx(4 * 8 / 3 if "heads" in name else 1, rel=1e-3)
