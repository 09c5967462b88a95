"""Masks rounded for all sites at once: the product, and gradients against autograd's own with a cast at every site."""

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Axis, Gate, Kind
from compresso.edit.site_mask import SiteMask, site_masks

AXES = [
    Axis("heads", Kind.HEAD, 3, (), (Gate("o", "input", width=2),), "a"),
    Axis("more", Kind.HEAD, 3, (), (Gate("p", "input", width=2),), "a"),
    Axis("channels", Kind.CHANNEL, 6, (), (Gate("gate", "output"), Gate("up", "output")), "a"),
    Axis("hidden", Kind.HIDDEN, 6, (), tuple(Gate(f"out.{i}", "output") for i in range(70)), "a"),
    Axis("layers", Kind.LAYER, 2, (), (Gate("out.0", "output", unit=1),), "a"),
]


def _masks(batch: int | None, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.name: torch.rand(*(() if batch is None else (batch,)), axis.size, generator=generator).requires_grad_()
        for axis in AXES
    }


@pytest.mark.parametrize("batch", [None, 2])
def test_gradients_are_those_of_a_cast_at_every_site(batch: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    found: list[list[Tensor]] = []
    activation = torch.randn(2, 5, 6, generator=generator).bfloat16()
    outgoing = torch.randn(2, 5, 6, generator=generator).bfloat16()
    for together in (False, True):
        masks = _masks(batch)
        leaf = activation.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            sites = site_masks(AXES, masks)
        assert all(one.rounded is not None and one.rounded.dtype == torch.bfloat16 for one in sites.values())
        products = [(one if together else SiteMask(one.values)).times(leaf) for one in sites.values()]
        assert len(products) == 74 and all(one.dtype == torch.bfloat16 for one in products)
        torch.autograd.backward(products, [outgoing] * len(products))
        gradients = [mask.grad for mask in masks.values()]
        assert all(one is not None and one.dtype == torch.float32 for one in gradients)
        found.append([torch.stack(products), *(one for one in gradients if one is not None)])
    assert torch.equal(found[0][0], found[1][0])
    for alone, together_ in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(together_, alone, rtol=1e-6, atol=1e-5)  # sums of float32 in another order


def test_nothing_is_rounded_without_autocast_nor_where_a_gradient_would_be_lost() -> None:
    assert all(one.rounded is None for one in site_masks(AXES, _masks(2)).values())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, torch.autocast("cpu", torch.bfloat16):
            assert all(one.rounded is None for one in site_masks(AXES, _masks(2)).values())


def test_activations_of_another_type_meet_the_mask_itself() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        site = site_masks(AXES, _masks(None))["gate", "output"]
    activation = torch.ones(1, 2, 6)
    assert torch.equal(site.times(activation), site.values.expand(1, 2, 6))
