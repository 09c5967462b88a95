"""A scale that moves between a group of linears and what feeds it changes nothing, in every architecture, whole and
pruned.
"""

import pytest
import torch
from tests.arch.conftest import CONFIGS, MIXTURES
from tests.arch.test_laws import GENERATING, Tiny, described, logits, random_masks
from torch import nn

from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.observe.folds import Stats
from compresso.sweep.scaling import divide_
from compresso.sweep.shared_scale import ScaledTogether
from compresso.sweep.targets import Where, chosen, matrix

EXPERTS = ("*.experts.*",)
"""Stacked, and scaled together with the router; see below."""


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_scale_moves_through_every_feeder(tiny: Tiny, name: str, pruned: bool) -> None:
    model = tiny(name)
    arch, axes = described(model)
    if pruned:
        shrink_(model, axes, Plan.from_masks(axes, random_masks(axes, "together", soft=False)))
    before = logits(model)
    generator, moved = torch.Generator().manual_seed(1), 0
    where = Where(ignore=EXPERTS) if name in MIXTURES else Where()
    for here in chosen(model, arch, where).values():
        for group in here:
            if group.producer is None:
                continue
            scale = torch.rand(matrix(model, group.names[0]).shape[1], generator=generator) * 3 + 0.2
            divide_(model, group.producer, scale)
            with torch.no_grad():
                for linear in group.names:
                    matrix(model, linear).mul_(scale)
            moved += 1
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)
    none = name not in GENERATING or name == "bloom_post_norm"  # whose norms feed the sums too
    assert moved >= (0 if none else 1 if name in MIXTURES else 2)  # a mixture's norm feeds its router, too


def test_a_part_of_a_group_has_no_feeder(tiny: Tiny) -> None:
    model = tiny("llama_gqa")
    arch, _ = described(model)
    groups = chosen(model, arch, Where(ignore=("*.q_proj",)))[0]
    assert [group.producer and group.producer.module.rpartition("0.")[2] for group in groups][:2] == [
        None,
        None,
    ]  # k, v; o, of grouped queries
    assert groups[2].producer is not None and groups[2].producer.module == "model.layers.0.post_attention_layernorm"
    assert groups[3].producer is not None and isinstance(model.get_submodule(groups[3].producer.module), nn.Linear)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_scale_moves_into_experts_from_what_feeds_them(tiny: Tiny, name: str) -> None:
    """The norm's through all that reads it together, the router and a shared expert with them; up's in each expert."""
    model = tiny(name)
    arch, _ = described(model)
    before = logits(model)
    generator = torch.Generator().manual_seed(1)

    def drawn(weight: torch.Tensor) -> torch.Tensor:
        return torch.rand(weight.shape[1], generator=generator) * 3 + 0.2

    together = ScaledTogether(model, lambda *_: {}, lambda pieces: (drawn(pieces[0][0]), {}))
    fed: set[bool] = set()
    for here in chosen(model, arch, Where(), experts=True).values():
        seen = {g.names[0]: Stats(torch.ones(1 + (n := matrix(model, g.names[0]).shape[1]), n), 1) for g in here}
        told = together.prepare(here, seen)
        assert bool(told) == any(group.stack for group in here)
        for group in here:
            if group.producer is not None and group.producer.expert is not None:
                weight = matrix(model, group.names[0])
                scale = drawn(weight)
                divide_(model, group.producer, scale)
                weight.mul_(scale)
                fed.add(True)
    assert fed == (set() if name == "moe_gpt_oss" else {True})
    torch.testing.assert_close(logits(model), before, atol=5e-4, rtol=1e-3)
