"""Removal in rounds: each ends within its share, what left stays away, and the last meets the budget and its shapes."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.solve.removal import lowest_within
from compresso.solve.rounds import Rounds

KINDS = (Kind.HEAD, Kind.CHANNEL)
WITH_QUERIES = (Kind.HEAD, Kind.QUERY, Kind.CHANNEL)


class Shrinking:
    """A model of 3 layers, 4 heads and 48 channels each, that units leave."""

    def __init__(self, queries: int = 2, kinds: tuple[Kind, ...] = KINDS) -> None:
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4 * queries,
            num_key_value_heads=4,
            head_dim=8,
        )
        self.model, self.arch, self.kinds = LlamaForCausalLM(config), arch_for(config), kinds

    @property
    def axes(self) -> list[Axis]:
        return [axis for axis in axes_of(self.arch, self.model, self.kinds) if axis.kind in self.kinds]

    @property
    def cost(self) -> CostModel:
        return CostModel(axes_of(self.arch, self.model, self.kinds), self.arch.weights(self.model))

    def rounds(self, **budget: object) -> Rounds:
        return Rounds(self.axes, self.cost, Budget(**{"kinds": self.kinds, **budget}), 0.05)  # type: ignore[arg-type]

    def through(self, rounds: Rounds, worth: Mapping[str, Tensor]) -> Iterator[Plan]:
        """What is left after each round, of units whose worth never changes."""
        plan = Plan()
        for r in range(len(rounds)):
            axes = self.axes
            left = {axis.name: list(plan.kept.get(axis.name, range(axis.size))) for axis in rounds.axes}
            first = {axis.name: plan.original_name(axis.name) for axis in axes}
            scores = {name: worth[of][left[of]] for name, of in first.items()}
            masks = rounds.masks(r, plan, axes, self.cost, scores, scores)
            now = Plan.from_masks(axes, masks)
            shrink_(self.model, axes_of(self.arch, self.model, WITH_QUERIES), now)
            plan = plan.then(now)
            yield plan


def drawn(axes: list[Axis], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}


@pytest.mark.parametrize("seed", range(4))
def test_rounds_end_within_their_shares_and_units_leave_in_one_order(seed: int) -> None:
    made = Shrinking()
    rounds, worth = made.rounds(keep=0.72), drawn(made.axes, seed)
    dense, before = int(rounds.cost().blocks), Plan()
    head = 32 * 8 * 6  # q of two heads, o of two, k and v
    for r, plan in enumerate(made.through(rounds, worth)):
        count = int(made.cost().blocks)
        assert count == int(rounds.cost.of(plan).blocks)
        if r + 1 < len(rounds):
            assert (1 - 0.05 * (r + 1)) * dense <= count < (1 - 0.05 * (r + 1)) * dense + head
        for name, units in plan.kept.items():
            assert set(units) <= set(before.kept.get(name, units))
            gone = [float(worth[name][u]) for u in range(len(worth[name])) if u not in units]
            assert not gone or max(gone) < min((float(worth[name][u]) for u in units), default=float("inf"))
        before = plan
    assert len(rounds) == 6
    assert 0.72 * dense - head < int(made.cost().blocks) <= 0.72 * dense


@pytest.mark.parametrize(
    "shapes",
    [
        {"uniform_over": (Kind.CHANNEL,), "floor": {Kind.HEAD: "keep"}},
        {"multiple_of": {Kind.CHANNEL: 8}, "floor": {Kind.HEAD: 3}},
    ],
)
def test_shapes_hold_after_the_last_round(shapes: dict[str, object]) -> None:
    made = Shrinking()
    rounds = made.rounds(keep=0.6, **shapes)
    *_, plan = made.through(rounds, drawn(made.axes, 0))
    channels = {len(plan.kept[f"layers.{i}.channels"]) for i in range(3)}
    heads = [len(plan.kept[f"layers.{i}.heads"]) for i in range(3)]
    assert len(channels) == 1 if "uniform_over" in shapes else all(width % 8 == 0 for width in channels)
    assert min(heads) >= (2 if shapes["floor"] == {Kind.HEAD: "keep"} else 3)
    assert 0.55 < float(made.cost().blocks / rounds.cost().blocks) <= 0.6 * 1.005


def test_units_that_nothing_is_known_of_leave_last_and_in_the_order_of_their_prior() -> None:
    made = Shrinking()
    axes = [axis for axis in made.axes if axis.kind == Kind.CHANNEL]  # a head is worth more than these rounds
    priors = drawn(axes, 1)
    rounds, few = (Rounds(axes, made.cost, Budget(keep, kinds=(Kind.CHANNEL,)), 0.05) for keep in (0.94, 0.98))
    scores = {name: torch.full_like(prior, torch.inf) for name, prior in priors.items()}
    scores["layers.1.channels"][:10] = 0  # ten equal ones
    first = rounds.masks(0, Plan(), axes, made.cost, scores, priors)
    assert all(bool(mask.all()) for name, mask in first.items() if name != "layers.1.channels")
    assert 0 < int((first["layers.1.channels"] == 0).sum()) <= 10
    last = rounds.masks(1, Plan(), axes, made.cost, scores, priors)
    assert not bool(last["layers.1.channels"][:10].any())
    for name, mask in last.items():
        for known in (scores[name].isfinite(), scores[name].isinf()):
            off, on = priors[name][known & (mask == 0)], priors[name][known & (mask == 1)]
            assert not len(off) or not len(on) or float(off.max()) < float(on.min())
    lowest = few.masks(0, Plan(), axes, made.cost, scores, priors)["layers.1.channels"]
    assert lowest[priors["layers.1.channels"][:10].argmax()] == 1
    assert lowest[priors["layers.1.channels"][:10].argmin()] == 0


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [{}, {"uniform_over": WITH_QUERIES}, {"multiple_of": {Kind.QUERY: 2}}])
@pytest.mark.parametrize("seed", range(4))
def test_key_value_heads_of_a_layer_keep_as_many_query_heads_in_every_round(
    seed: int, shapes: dict[str, object]
) -> None:
    made = Shrinking(queries=4, kinds=WITH_QUERIES)
    rounds = made.rounds(keep=0.6, floor={Kind.HEAD: 1}, **shapes)
    worth = {
        axis.name: one / 4 if axis.within else one
        for axis, one in zip(made.axes, drawn(made.axes, seed).values(), strict=True)
    }
    before, ratios, groups = Plan(), set[int](), set[int]()
    for plan in made.through(rounds, worth):
        plan.check(rounds.axes)
        assert int(made.cost().blocks) == int(rounds.cost.of(plan).blocks)
        for i, shape in enumerate(made.arch.shapes(made.model)):
            ratio = shape.query_heads // shape.kv_heads
            ratios.add(ratio)
            groups.add(shape.kv_heads)
            assert "multiple_of" not in shapes or ratio % 2 == 0
            for g in plan.kept[f"layers.{i}.heads"]:
                name = f"layers.{i}.heads.{g}.queries"
                units = plan.kept.get(name, (0, 1, 2, 3))
                assert len(units) == ratio and set(units) <= set(before.kept.get(name, units))
                gone = [float(worth[name][u]) for u in range(4) if u not in units]
                assert not gone or max(gone) < min(float(worth[name][u]) for u in units)
        before = plan
    assert len(ratios) > 1 and len(groups) > 1
    least = 0.5 if "uniform_over" in shapes else 0.58  # a head of every layer at once, none of which comes back
    assert least < float(made.cost().blocks / rounds.cost().blocks) <= 0.6 * 1.005
    assert "uniform_over" not in shapes or len(set(made.arch.shapes(made.model))) == 1


def test_what_leaves_at_once_leaves_for_the_mean_of_its_scores() -> None:
    made = Shrinking(kinds=WITH_QUERIES)
    axes = [axis for axis in made.axes if axis.kind == Kind.QUERY]
    cost, item = made.cost, 4 * 2 * 32 * 8  # four query heads: rows of q and columns of o
    scores = {axis.name: torch.tensor([0.5, 0.5 + axis.within[1]]) for axis in axes if axis.within}
    scores |= {f"layers.1.heads.{g}.queries": torch.tensor([1.0 if g else 0.2, 0.4]) for g in range(4)}  # mean .35
    plan = lowest_within(axes, scores, cost, "blocks", 2 * item - 1)
    assert {name: units for name, units in plan.kept.items() if len(units) < 2} == {
        f"layers.1.heads.{g}.queries": ((0,) if g else (1,)) for g in range(4)
    }
    everything = lowest_within(axes, scores, cost, "blocks", 10 * item)
    assert {len(units) for units in everything.kept.values()} == {1}
    scores["layers.2.heads.3.queries"][:] = torch.inf
    known = lowest_within(axes, scores, cost, "blocks", 10 * item)
    assert all(len(known.kept[f"layers.2.heads.{g}.queries"]) == 2 for g in range(4))
