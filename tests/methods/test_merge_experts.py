"""Merging experts. Oracles: copies with channels in another order merge into what they are copies of; a weighted mean
and cosines by hand.
"""

from typing import Any

import pytest
import torch

from compresso.core.expert_merging import cosines, joined, likeness, shares
from compresso.edit.merge_experts import aligned, channels_of, merge_
from compresso.methods.drop_experts import DropExperts
from tests.methods.conftest import MakeJob
from tests.methods.test_awq_experts import FAMILIES
from tests.methods.test_drop_experts import LOOKS, logits, prepared, small


def copied_(experts: Any, source: int, target: int, order: torch.Tensor) -> None:
    """Make an expert another one's copy with its channels in some order."""
    with torch.no_grad():
        for part, own in zip(channels_of(experts, target), channels_of(experts, source), strict=True):
            part.copy_(own[order])
        if hasattr(experts, "down_proj_bias"):
            experts.down_proj_bias[target] = experts.down_proj_bias[source]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_copy_in_another_order_changes_nothing(make_job: MakeJob, name: str) -> None:
    model = prepared(make_job(), FAMILIES[name]()).model
    experts = model.get_submodule("model.layers.1.mlp.experts")
    width = len(channels_of(experts, 0)[0])
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    copied_(experts, 1, 2, order)
    before = {own: p.detach().clone() for own, p in experts.named_parameters()}
    ids = logits(model)
    assert torch.equal(order[aligned(channels_of(experts, 1), channels_of(experts, 2))], torch.arange(width))
    merge_(experts, [1, 2], torch.tensor([0.3, 0.7]))
    for own, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter, before[own])
    torch.testing.assert_close(logits(model), ids)


def test_the_mean_is_weighted_by_how_often_each_is_chosen(make_job: MakeJob) -> None:
    """Of an expert and a stronger copy of itself, which needs no other order."""
    experts = prepared(make_job(), small()).model.get_submodule("model.layers.0.mlp.experts")
    copied_(experts, 4, 6, torch.arange(24))
    before = experts.down_proj[4].detach().clone()
    with torch.no_grad():
        experts.down_proj[6] *= 3
    merge_(experts, [4, 6], shares(torch.tensor([0, 0, 0, 0, 6, 0, 2]), [4, 6]))
    torch.testing.assert_close(experts.down_proj[4], before * (0.75 + 0.25 * 3))
    assert shares(torch.zeros(3), [1, 2]).tolist() == [1, 0]


def test_experts_are_alike_by_routing_and_by_what_they_write() -> None:
    routing, outputs = torch.tensor([[4.0, 2, 0], [2, 4, 0], [0, 0, 9]]), torch.tensor([[1.0, 0], [1, 1], [0, 2]])
    assert cosines(routing).tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    half = 0.5**0.5
    wanted = torch.tensor([[1, (0.5 + half) / 2, 0], [(0.5 + half) / 2, 1, half / 2], [0, half / 2, 1]])
    assert torch.allclose(likeness(routing, outputs).float(), wanted)
    assert joined(wanted, (0, 2)) == {0: [1], 2: []} and joined(wanted, (1,)) == {1: [0, 2]}
    assert cosines(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_copies_join_what_they_are_copies_of_and_the_others_stay(make_job: MakeJob) -> None:
    """Four experts and a copy of each, with the same row of the router."""
    job = prepared(make_job(), small())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in job.model.model.layers:
            for e in range(4):
                copied_(layer.mlp.experts, e, 4 + e, torch.randperm(24, generator=generator))
                layer.mlp.gate.weight[4 + e] = layer.mlp.gate.weight[e]
    before = {own: p.detach().clone() for own, p in job.model.named_parameters()}
    done = DropExperts(score="frequency", keep=0.5, merge=True, **LOOKS)(job)
    told = done.records["drop_experts"]["merged"]
    for axis, kept in done.plan.kept.items():
        for one, members in told.get(axis, {}).items():
            assert one in kept and not set(members) & set(kept)
            assert all(member % 4 == one % 4 for member in members if member % 4 in {k % 4 for k in kept})
    layer = done.model.model.layers[0].mlp.experts
    for place, number in enumerate(done.plan.kept["layers.0.experts"]):
        joining = [number, *told["layers.0.experts"].get(number, [])]
        if len({one % 4 for one in joining}) == 1:  # its own copies alone
            torch.testing.assert_close(
                layer.down_proj[place], before["model.layers.0.mlp.experts.down_proj"][number], atol=1e-6, rtol=1e-5
            )


def test_merging_keeps_more_of_noisy_copies_than_dropping(make_job: MakeJob) -> None:
    """Experts in pairs, each the same function with its own noise: a mean is nearer to both."""
    lost: dict[bool, float] = {}
    for merge in (False, True):
        job = prepared(make_job(folder=str(merge)), small(layers=1))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            mlp = job.model.model.layers[0].mlp
            mlp.gate.weight[1::2] = mlp.gate.weight[::2]
            for e in range(0, 8, 2):
                copied_(mlp.experts, e, e + 1, torch.randperm(24, generator=generator))
            for stack in mlp.experts.parameters():
                stack += 0.1 * stack.std() * torch.randn(stack.shape, generator=generator)
        ids = torch.tensor([row["input_ids"] for row in job.rows])
        with torch.no_grad():
            dense = job.model(input_ids=ids).logits
            done = DropExperts(score="frequency", keep=0.5, merge=merge, **LOOKS)(job)
            lost[merge] = float((done.model(input_ids=ids).logits - dense).square().mean())
    assert lost[True] < lost[False]
