"""What the gates of one layer change there, taken apart from what gates of other layers do."""

from typing import Any

import torch
from torch import Tensor, nn

from compresso.arch.base import Arch


class Apart:
    """What the gates of one layer change there, the layers before it being as they are without gates.

    Attributes:
        error: mean over real tokens of |gated - whole|^2 / |stream|^2 [], of what attention adds to the stream that
            it is added to; of the last pass.
    """

    def __init__(self, arch: Arch, attention: nn.Module, block: nn.Module) -> None:
        inside = {id(module) for module in attention.modules()}
        linears = [block.get_submodule(name) for group in arch.linear_groups(block) for name in group]
        self._output = [one for one in linears if id(one) in inside][-1]
        self._squares: Tensor | None = None
        self._hook = block.register_forward_pre_hook(self._look, with_kwargs=True)
        self.error: Tensor | None = None

    def _look(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream = arguments[0] if arguments else named["hidden_states"]
        self._squares = stream.detach().float().square().sum(-1)

    def compare(self, gated: Tensor, whole: Tensor, real: Tensor) -> None:
        """Note the error of outputs [batch, tokens, heads, width], at tokens that are real [batch, tokens]."""
        assert self._squares is not None
        change = (gated - whole).flatten(2)
        added = self._output(change) - self._output(torch.zeros_like(change[:1, :1]))  # without its bias
        share = added.float().square().sum(-1) / self._squares.clamp(min=1e-12)
        self.error = (share * real).sum() / real.sum().clamp(min=1)

    def end(self) -> None:
        """Look no longer."""
        self._hook.remove()
