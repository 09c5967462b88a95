"""Where a model is looked at while it runs: hooks that show rows of values, and which of its positions are real.

Hooks only look. Some modules see examples and positions as one dimension (OPT's FFN: [batch * seq, width]); `Positions`
gives both the same shape, so that no site has to know.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[str, Tensor], None]
"""Takes in rows of values [n, width] under a statistic's name."""


class Positions:
    """Which positions of the batch that runs are tokens and which are padding."""

    def __init__(self) -> None:
        self.n, self.real = 0, None

    n: int
    """Examples of the batch."""
    real: Tensor | None
    """[batch, seq], bool; None where nothing is padded."""

    def set(self, batch: Mapping[str, Tensor]) -> None:
        """Go on to a batch: its attention_mask [batch, seq] says what is real, without one everything is."""
        mask = batch.get("attention_mask")
        self.n, self.real = len(next(iter(batch.values()))), None if mask is None else mask.bool()

    def rows(self, values: Tensor) -> Tensor:
        """[batch, seq, width], of values in that shape or [batch * seq, width]."""
        return values.reshape(self.n, -1, values.shape[-1])

    def mask(self, values: Tensor) -> Tensor:
        """Which of `rows(values)` are real [batch, seq], bool, on their device."""
        if self.real is None:
            return torch.ones(self.rows(values).shape[:2], dtype=torch.bool, device=values.device)
        return self.real.to(values.device)

    def tokens(self, values: Tensor) -> Tensor:
        """Those of the real positions [tokens, width], of values [batch, seq, width] or [batch * seq, width]."""
        return self.rows(values)[self.mask(values)]


Site = Callable[[See, Positions], Sequence[RemovableHandle]]
"""Hooks modules so that what they show is given to `see` while the model runs; returns the hooks."""

Look = Callable[[Tensor, Tensor, Positions], Tensor]
"""What a call shows: the module's first input and its (first) output, each as it is -> rows [n, width]."""


def calls(modules: Mapping[str, nn.Module], look: Look) -> Site:
    """Every call of some modules, by name of the statistic."""

    def hook(see: See, name: str, positions: Positions) -> Callable[..., None]:
        def shown(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            see(name, look(first_input(inputs, named), first_output(output), positions))

        return shown

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        return [
            module.register_forward_hook(hook(see, name, positions), with_kwargs=True)
            for name, module in modules.items()
        ]

    return site


def inputs(given: Tensor, output: Tensor, positions: Positions) -> Tensor:
    """Look: the input of each token [tokens, width], in float32 or wider."""
    return widened(positions.tokens(given))


def outputs(given: Tensor, output: Tensor, positions: Positions) -> Tensor:
    """Look: the output of each token [tokens, width], in float32 or wider."""
    return widened(positions.tokens(output))


def widened(values: Tensor) -> Tensor:
    """Values in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def first_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a module works on: its first argument, also where a caller names it."""
    return inputs[0] if inputs else next(value for value in named.values() if isinstance(value, Tensor))


def first_output(output: Any) -> Tensor:
    """What a module gives, of modules that give more the first."""
    return output[0] if isinstance(output, tuple) else output
