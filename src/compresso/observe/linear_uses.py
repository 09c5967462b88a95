"""What every linear layer of a model shows on a text: mean absolute inputs and outputs, and those of the activation
function behind it.

The activation function that belongs to a linear is the one that is given its output, the very same tensor: no names
have to be known. Padding is left out; sums run in float64.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.core.context import Uses
from compresso.errors import NumericError
from compresso.observe.folds import absolute_sums
from compresso.observe.observe import Batch, Pass, observe, whole
from compresso.observe.sites import Positions, See, Site, widened

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_SHOWN = ("inputs", "outputs", "unbiased", "activated")


def linear_uses(model: PreTrainedModel, batches: Iterable[Batch], how: Pass | None = None) -> dict[str, Uses]:
    """Name of each linear -> what it showed, float64 on the CPU; linears that never run are absent.

    Args:
        model: read in evaluation mode.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        how: display and journal of the pass.

    Raises NumericError if an activation is not finite.
    """
    stats = observe(model, [_linears(model)], absolute_sums, batches, run=whole, how=how)
    uses: dict[str, Uses] = {}
    for name in (name for name, module in model.named_modules() if isinstance(module, nn.Linear)):
        found = {what: stats[f"{name}/{what}"] for what in _SHOWN if f"{name}/{what}" in stats}
        if not all(bool(one.total.isfinite().all()) for one in found.values()):
            raise NumericError(f"activations at {name} are not finite on this data; use float32 or bfloat16")
        if found:
            uses[name] = Uses(**{what: one.total.cpu() / max(one.n, 1) for what, one in found.items()})
    return uses


def _linears(model: nn.Module) -> Site:
    """Every linear, as "name/what" with what it shows, and the activation function that reads it."""

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        last: list[tuple[str, Tensor]] = []

        def show(name: str, what: str, values: Tensor) -> None:
            see(f"{name}/{what}", widened(positions.tokens(values)))

        def linear_hook(name: str) -> Callable[..., None]:
            def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                show(name, "inputs", inputs[0])
                show(name, "outputs", output)
                if module.bias is not None:
                    show(name, "unbiased", output - module.bias)
                last[:] = [(name, output)]

            return hook

        def activation_hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if last and inputs and inputs[0] is last[0][1]:
                show(last[0][0], "activated", output)

        handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(linear_hook(name)))
            elif type(module).__module__ in _ACTIVATIONS:
                handles.append(module.register_forward_hook(activation_hook))
        return handles

    return site
