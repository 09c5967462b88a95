"""Layers in one pool with units: what can be done without goes first, what the model lives on stays, and both pools are
counted in the loss that leaving out their share really costs.
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.score import prices_of_units
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError
from compresso.observe.gate_taylor import sensitivity_per_cost
from compresso.observe.losses import losses_under
from compresso.observe.pooled import Looks, n_losses, pooled_per_cost
from compresso.solve.allocate import allocate
from compresso.solve.depth import absorbed, without

POOL = (Kind.HEAD, Kind.CHANNEL, Kind.LAYER)


def made(scales: tuple[float, ...] = (1.0, 0.0, 1.0, 1e-3)) -> PreTrainedModel:
    """A sure model whose layers write more or less: its own choices are the labels, so that all it loses is lost."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=len(scales),
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for layer, scale in zip(model.model.layers, scales, strict=True):
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        ids = torch.randint(2, 50, (4, 12), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            chosen = model(input_ids=ids).logits.argmax(-1)
        labels = torch.cat([torch.full((4, 1), -100), chosen[:, :-1]], dim=1)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def described(model: PreTrainedModel, kinds: tuple[Kind, ...] = POOL) -> tuple[list[Axis], CostModel]:
    arch = arch_for(model.config)
    axes = arch.axes(model)
    return [axis for axis in axes if axis.kind in kinds], CostModel(axes, arch.weights(model))


def test_without_parts_scores_are_those_of_gates_bit_for_bit() -> None:
    model = made()
    axes, cost = described(model, (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN))
    data = batches(model)
    pooled = pooled_per_cost(model, axes, cost, Budget(0.7), data, Looks([]))
    plain = sensitivity_per_cost(model, axes, cost, data)
    assert list(pooled) == list(plain)
    assert all(torch.equal(pooled[name], plain[name]) for name in plain)
    assert n_losses(axes, (Kind.HEAD, Kind.CHANNEL)) == 0


@pytest.mark.parametrize("kinds", [(Kind.LAYER,), POOL, (Kind.HEAD, Kind.CHANNEL, Kind.ATTENTION, Kind.MLP)])
def test_what_does_nothing_goes_first_and_what_the_model_lives_on_stays(kinds: tuple[Kind, ...]) -> None:
    """Layer 1 writes nothing, layer 3 next to nothing; the budget takes two of four layers."""
    model = made()
    axes, cost = described(model, kinds)
    data = batches(model)
    budget = Budget(0.5, kinds=kinds)
    scores = pooled_per_cost(model, axes, cost, budget, data, Looks(data))
    for axis in axes:
        if axis.kind in (Kind.LAYER, Kind.ATTENTION, Kind.MLP):
            of_layer = scores[axis.name]
            assert bool((of_layer > 0).all())
            assert max(of_layer[1], of_layer[3]) < 0.1 * min(of_layer[0], of_layer[2])
            assert of_layer[1] <= of_layer[3]
    masks = absorbed(axes, allocate(axes, scores, cost, budget).masks(axes))
    useless = {axis.name: torch.tensor([1.0, 0.0, 1.0, 0.0]) for axis in axes if axis.layer is None}
    assert all(bool(masks[name][[0, 2]].all()) for name in useless)
    assert cost(masks).blocks == cost({**masks, **useless}).blocks  # closed, or without a unit
    if Kind.LAYER in kinds:
        assert masks["layers"].tolist() == [1, 0, 1, 0]


def test_a_useless_layer_is_taken_before_any_unit_and_alone_where_it_suffices() -> None:
    model = made()
    axes, cost = described(model)
    data = batches(model)
    budget = Budget(0.75, kinds=POOL)
    plan = allocate(axes, pooled_per_cost(model, axes, cost, budget, data, Looks(data)), cost, budget)
    masks = absorbed(axes, plan.masks(axes))
    assert masks["layers"].tolist() == [1, 0, 1, 1]
    assert all(bool(masks[axis.name].all()) for axis in axes if axis.layer not in (None, 1))


def test_each_pool_is_counted_in_the_loss_that_its_share_really_costs() -> None:
    """The sum over what the budget takes of a pool alone is the measured rise of the loss without it."""
    model = made((1.0, 0.4, 1.0, 0.3))
    axes, cost = described(model)
    data = batches(model)
    budget = Budget(0.6, kinds=POOL)
    scores = pooled_per_cost(model, axes, cost, budget, data, Looks(data))
    price = prices_of_units(axes, cost)
    for kinds in ((Kind.HEAD, Kind.CHANNEL), (Kind.LAYER,)):
        pool = [axis for axis in axes if axis.kind in kinds]
        masks = allocate(pool, scores, cost, Budget(0.6, kinds=kinds)).masks(axes)
        dense, alone = losses_under(model, axes, [{}, masks], data).tolist()
        foreseen = sum(float((scores[name] * price[name] * (mask == 0)).sum()) for name, mask in masks.items())
        assert foreseen == pytest.approx(alone - dense, rel=1e-6)


def test_a_single_part_is_worth_what_the_smaller_model_loses() -> None:
    """Of one pool of layers the factor is common, so rises keep their proportions."""
    model = made((1.0, 0.4, 1.0, 0.3))
    axes, cost = described(model, (Kind.LAYER,))
    data = batches(model)
    scores = pooled_per_cost(model, axes, cost, Budget(0.75, kinds=(Kind.LAYER,)), data, Looks(data))["layers"]
    dense = float(losses_under(model, [], [{}], data))
    rises: list[float] = []
    for layer in range(4):
        smaller = made((1.0, 0.4, 1.0, 0.3))
        every = arch_for(smaller.config).axes(smaller)
        shrink_(smaller, every, without([axis for axis in every if axis.name == "layers"], [("layers", layer)]))
        rises.append(float(losses_under(smaller, [], [{}], data)) - dense)
    torch.testing.assert_close(
        scores / scores[0], torch.tensor(rises, dtype=torch.float64) / rises[0], rtol=1e-3, atol=0
    )


def test_rises_are_handed_out_in_another_order_where_one_is_given() -> None:
    """The same amounts, the least of them to the part that is first in the order."""
    model = made((1.0, 0.4, 1.0, 0.3))
    axes, cost = described(model, (Kind.LAYER,))
    data = batches(model)
    budget = Budget(0.75, kinds=(Kind.LAYER,))
    own = pooled_per_cost(model, axes, cost, budget, data, Looks(data))["layers"]
    order = torch.tensor([0.3, 0.1, 0.4, 0.2])
    given = pooled_per_cost(model, axes, cost, budget, data, Looks(data, order={"layers": order}))["layers"]
    assert given.argsort().tolist() == order.argsort().tolist() != own.argsort().tolist()
    torch.testing.assert_close(given.sort().values / given.min(), own.sort().values / own.min())


def test_a_pool_that_cannot_give_what_the_budget_asks_is_measured_at_half_of_what_it_can() -> None:
    model = made()
    kinds = (Kind.CHANNEL, Kind.ATTENTION)
    axes, cost = described(model, kinds)
    data = batches(model)
    scores = pooled_per_cost(model, axes, cost, Budget(0.2, kinds=kinds), data, Looks(data))
    assert all(bool(score.isfinite().all()) for score in scores.values())


def test_a_sub_layer_that_left_before_is_kept_for_it_costs_nothing() -> None:
    model = made((1.0, 1.0, 1.0, 1.0))
    axes, _ = described(model, (Kind.ATTENTION,))
    shrink_(model, axes, without(axes, [("attention", 2)]))
    axes, cost = described(model, (Kind.ATTENTION, Kind.CHANNEL))
    data = batches(model)
    scores = pooled_per_cost(model, axes, cost, Budget(0.7, kinds=(Kind.ATTENTION, Kind.CHANNEL)), data, Looks(data))
    assert scores["attention"].isfinite().all()
    assert scores["attention"][2] == scores["attention"].max()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = made()
    axes, cost = described(model, (Kind.LAYER,))
    data = batches(model)
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        pooled_per_cost(model, axes, cost, Budget(0.7, kinds=(Kind.LAYER,)), data, Looks(data))


def test_the_weight_of_depth_moves_parts_alone() -> None:
    model = made((1.0, 0.4, 1.0, 0.3))
    axes, cost = described(model)
    data = batches(model)
    budget = Budget(0.6, kinds=POOL)
    full, half = (pooled_per_cost(model, axes, cost, budget, data, Looks(data), weight=weight) for weight in (1.0, 0.5))
    for axis in axes:
        assert torch.equal(half[axis.name], full[axis.name] * (0.5 if axis.kind == Kind.LAYER else 1.0))
