"""Watches the residual stream of a model while it runs: what enters and leaves each layer, and what its sub-layers
write.

What is seen of one layer is handed on when the layer has run, so that a fold over layers and batches never holds more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compresso.core.axis import Axis, Kind
from compresso.errors import NumericError
from compresso.observe.sites import Positions, See, Site, first_input, first_output


@dataclass
class Block:
    """What was seen of a block that ran, at the tokens of interest: the stream as it entered and left, and what
    sub-layers wrote, each [tokens, hidden].
    """

    entered: Tensor
    left: Tensor
    written: dict[Kind, Tensor] = field(default_factory=dict[Kind, Tensor])


Pick = Callable[[Tensor, Positions], Tensor]
"""Chooses tokens [tokens, hidden] from states [batch, seq, hidden] or [batch * seq, hidden]."""


def tokens(states: Tensor, positions: Positions) -> Tensor:
    """Pick: all real tokens."""
    return positions.tokens(states)


def last_tokens(states: Tensor, positions: Positions) -> Tensor:
    """Pick: the last real token of each example, wherever its padding lies."""
    rows, real = positions.rows(states), positions.mask(states)
    last = real.shape[1] - 1 - real.int().flip(1).argmax(dim=1)
    return rows[range(len(rows)), last]


def residual(
    model: nn.Module,
    blocks: nn.ModuleList,
    sub_layers: Sequence[Axis],
    pick: Pick,
    ran: Callable[[int, Block, See], None],
) -> Site:
    """`ran` is called with each block that has run, and gives to `See` what is of interest.

    Args:
        model: whose modules the sub-layers' gates name.
        blocks: its layers.
        sub_layers: axes of attentions and MLPs whose outputs are kept, too.
        pick: the tokens of interest.
        ran: takes a layer's index and what was seen of it.

    While the model runs, NumericError is raised if a state of interest is not finite.
    """

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        entered: list[Tensor] = []
        written: dict[Kind, Tensor] = {}

        def picked(states: Tensor, where: str) -> Tensor:
            chosen = pick(states, positions)
            if not bool(chosen.isfinite().all()):
                raise NumericError(
                    f"the residual stream is not finite at {where}: the model overflows on this data; use float32 or"
                    " bfloat16"
                )
            return chosen

        def enters(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            entered[:] = [picked(first_input(inputs, named), "a layer's input")]
            written.clear()

        def writes(kind: Kind) -> Callable[..., None]:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                chosen = pick(first_output(output), positions)
                written[kind] = written[kind] + chosen if kind in written else chosen

            return hook

        def leaves(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                ran(layer, Block(entered[0], picked(first_output(output), f"layer {layer}"), dict(written)), see)

            return hook

        handles: list[RemovableHandle] = []
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enters, with_kwargs=True))
            handles.append(block.register_forward_hook(leaves(layer)))
        for axis in sub_layers:
            handles += [
                model.get_submodule(gate.module).register_forward_hook(writes(axis.kind)) for gate in axis.gates
            ]
        return handles

    return site
