"""What every linear layer of a model shows on a text: mean absolute inputs and outputs, and those of the activation
function behind it.

The activation function that belongs to a linear is the one that is given its output, the very same tensor: no names
have to be known. Padding is left out; sums run in float64.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.context import Uses
from compresso.errors import NumericError

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


@torch.no_grad()
def linear_uses(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Uses]:
    """Name of each linear -> what it showed, float64 on the CPU; linears that never run are absent.

    Args:
        model: read in evaluation mode.
        batches: input_ids and attention_mask, each int64 [batch, seq].

    Raises NumericError if an activation is not finite.
    """
    model.eval()
    sums: dict[str, dict[str, Tensor]] = {}
    real, n_tokens = torch.zeros(0), 0
    last: list[tuple[str, Tensor]] = []

    def add(name: str, what: str, values: Tensor) -> None:
        seen = values.reshape(*real.shape, -1)[real].abs().double().sum(dim=0).cpu()
        of_name = sums.setdefault(name, {})
        of_name[what] = of_name[what] + seen if what in of_name else seen

    def linear_hook(name: str) -> Any:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            add(name, "inputs", inputs[0])
            add(name, "outputs", output)
            if module.bias is not None:
                add(name, "unbiased", output - module.bias)
            last[:] = [(name, output)]

        return hook

    def activation_hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if last and inputs and inputs[0] is last[0][1]:
            add(last[0][0], "activated", output)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear_hook(name)))
        elif type(module).__module__ in _ACTIVATIONS:
            handles.append(module.register_forward_hook(activation_hook))
    try:
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            real = inputs["attention_mask"].bool()
            n_tokens += int(real.sum())
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        if not all(bool(total.isfinite().all()) for total in found.values()):
            raise NumericError(f"activations at {name} are not finite on this data; use float32 or bfloat16")
    return {
        name: Uses(**{what: total / max(n_tokens, 1) for what, total in found.items()}) for name, found in sums.items()
    }
