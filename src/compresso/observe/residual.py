"""Watches the residual stream of a model while it runs: what enters and leaves each layer, and what its sub-layers
write.

Hooks only look. What is seen of one layer is handed on when the layer has run, so that a fold over layers and batches
never holds more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.errors import NumericError


@dataclass
class Block:
    """What was seen of the block that runs, at the tokens of interest: the stream as it entered and left, and what
    sub-layers wrote.
    """

    entered: Tensor
    left: Tensor
    written: dict[Kind, Tensor] = field(default_factory=dict[Kind, Tensor])


@contextmanager
def watched(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    sub_layers: Sequence[Axis],
    pick: Callable[[Tensor], Tensor],
    seen: Callable[[int, Block], None],
) -> Iterator[None]:
    """Within the context, `seen` is called with each block that has run; `pick` chooses tokens from [batch, seq,
    hidden].
    """
    entered = torch.empty(0)
    written: dict[Kind, Tensor] = {}

    def picked(states: Tensor, where: str) -> Tensor:
        chosen = pick(states)
        if not bool(chosen.isfinite().all()):
            raise NumericError(
                f"the residual stream is not finite at {where}: the model overflows on this data; use float32 or"
                " bfloat16"
            )
        return chosen

    def enters(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal entered
        entered = picked(inputs[0] if inputs else named["hidden_states"], "a layer's input")
        written.clear()

    def writes(kind: Kind) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            chosen = pick(output)
            written[kind] = written[kind] + chosen if kind in written else chosen

        return hook

    def leaves(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            left = picked(output[0] if isinstance(output, tuple) else output, f"layer {layer}")
            seen(layer, Block(entered, left, dict(written)))

        return hook

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enters, with_kwargs=True))
            handles.append(block.register_forward_hook(leaves(layer)))
        for axis in sub_layers:
            handles += [
                model.get_submodule(gate.module).register_forward_hook(writes(axis.kind)) for gate in axis.gates
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_body(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """One forward pass without the head."""
    model.eval()
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
