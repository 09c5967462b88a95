"""The product of activations and masks of other types, against autograd's own in float64."""

import pytest
import torch

from compresso.edit.site_mask import SiteMask, Together


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6,), (1,), (2, 1, 6), (2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_are_those_of_the_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activation = _numbers(2, 300, 6).to(dtype).requires_grad_()
    mask = _numbers(*shape, seed=1).float().requires_grad_()
    outgoing = _numbers(2, 300, 6, seed=2).to(dtype)
    product = SiteMask(mask).times(activation)
    assert product.dtype == dtype
    product.backward(outgoing)
    exact = activation.detach().double().requires_grad_(), mask.detach().double().requires_grad_()
    (exact[0] * exact[1]).backward(outgoing.double())
    assert activation.grad is not None and mask.grad is not None
    assert activation.grad.dtype == dtype and mask.grad.dtype == torch.float32 and mask.grad.shape == shape
    near = 2e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(activation.grad.double(), exact[0].grad, rtol=near, atol=near)
    terms = activation.numel() // mask.numel()
    # each of the products summed is rounded by itself, half up and half down
    torch.testing.assert_close(mask.grad.double(), exact[1].grad, rtol=1e-6, atol=near * terms**0.5 / 4)


def test_sums_over_many_tokens_are_not_rounded_to_the_activations_type() -> None:
    """Of so many ones: bfloat16 has 300 and 302, and nothing between."""
    mask = torch.ones(1, requires_grad=True)
    SiteMask(mask).times(torch.ones(1, 301, 1, dtype=torch.bfloat16)).sum().backward()
    assert mask.grad is not None and mask.grad.item() == 301


def test_masks_that_are_set_together_are_rounded_together() -> None:
    together = Together()
    masks = [SiteMask(_numbers(*shape, seed=i).float(), together) for i, shape in enumerate([(6,), (2, 1, 6), (1,)])]
    activation = torch.ones(2, 3, 6, dtype=torch.bfloat16)
    first = masks[1].times(activation)
    late = SiteMask(_numbers(6, seed=9).float(), together)
    for mask in (*masks, late):
        assert torch.equal(mask.times(activation), activation * mask.values.bfloat16())
    assert torch.equal(first, masks[1].times(activation))
    assert together.rounded(0, activation).untyped_storage().data_ptr() == (
        together.rounded(2, activation).untyped_storage().data_ptr()
    )


def test_what_inference_rounded_is_not_used_where_gradients_flow() -> None:
    values = _numbers(6).float().requires_grad_()
    mask, activation = SiteMask(values), torch.ones(2, 3, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.inference_mode():
        mask.times(activation)
    mask.times(activation).sum().backward()
    assert values.grad is not None and (values.grad == 6).all()
