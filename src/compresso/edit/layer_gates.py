"""Compresso's optional layer gates (arXiv 2310.05015, described in its published code): a gate says whether pruning
acts in a layer.

The meaning is the reverse of CoFi's and LLM-Shearing's layer masks: a closed gate leaves its layer dense, it removes
nothing.
"""

from torch import Tensor


def effective_mask(unit_mask: Tensor, layer_gate: Tensor) -> Tensor:
    """The unit mask a layer really applies: 1 - G (1 - z), where G is the gate rounded to 0 or 1.

    unit_mask: [..., size]. layer_gate: [] or broadcastable, in [0, 1]; its gradient passes straight through the
    rounding.
    """
    switch = (layer_gate >= 0.5).to(layer_gate.dtype) + layer_gate - layer_gate.detach()
    return 1 - switch * (1 - unit_mask)
