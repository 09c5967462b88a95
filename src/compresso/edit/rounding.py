"""How far roundings move what a model computes.

Deep models magnify them: one rounding of an early layer may move logits by thousands. So a bound on the difference
between two orders of the same sums cannot be a multiple of the last logits' rounding; it has to be measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROUNDINGS = 30.0
"""How many times `rounding_of` two computations of one thing may lie apart: sums of other lengths are rounded in
another order, and the largest of a few draws is not the largest there is.
"""
_DRAWS = 3


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: neither TF32 nor bfloat16 in their place, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


@torch.no_grad()
def rounding_of(model: nn.Module, computed: Callable[[], Tensor], exact: Tensor) -> float:
    """The largest change of the outputs when each module's result is rounded once more, at random.

    Every module without children adds noise to its result: uniform, of one rounding of the result's root mean square a
    row, since what a sum loses is relative to its terms and not to what is left of them.

    Args:
        model: hooked meanwhile, and left as it was.
        computed: runs it.
        exact: what `computed` gives without noise.

    Returns the largest of three draws.
    """
    generator = torch.Generator().manual_seed(0)

    def round_once_more(_: nn.Module, __: tuple[object, ...], result: object) -> object:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        size = result.float().square().mean(-1, keepdim=True).sqrt() * torch.finfo(result.dtype).eps
        noise = torch.rand(result.shape, generator=generator).to(result.device) * 2 - 1
        return (result.float() + noise * size).to(result.dtype)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(round_once_more) for leaf in leaves]
    try:
        return max(float((computed() - exact).abs().max()) for _ in range(_DRAWS))
    finally:
        for handle in handles:
            handle.remove()
