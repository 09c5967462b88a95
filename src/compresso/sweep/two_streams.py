"""Two models block by block on the same tokens, the dense one and what was made of it, with what their sub-layers write
to the stream in sight.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.observe.overflow import check_states
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.block import BlockBatch, output_of
from compresso.sweep.calls import BlockCall, recorded_calls
from compresso.sweep.lost import writers

_ROUNDING = 0.2
"""Difference between what a block added to a token and what its sub-layers wrote, relative to the former, that rounding
in bfloat16 may make of nothing; a norm in between makes it about 1.
"""


class _ReachedError(Exception):
    """All that is wanted of a block has been computed."""


@dataclass
class Written:
    """What a block's writing linears saw and said in one call.

    Args:
        inputs: what the linear of a kind read [rows, seq, in].
        outputs: what it wrote [rows, seq, hidden], its bias included.
    """

    inputs: dict[Kind, Tensor] = field(default_factory=dict[Kind, Tensor])
    outputs: dict[Kind, Tensor] = field(default_factory=dict[Kind, Tensor])

    def total(self, kinds: Sequence[Kind]) -> Tensor | float:
        """The sum of what these kinds wrote, float32; 0 where none is there."""
        return sum((self.outputs[kind].float() for kind in kinds if kind in self.outputs), 0.0)


class Known:
    """What a model's own stream was, for repairs of several smaller models on the same tokens.

    Args:
        room: most bytes kept; what does not fit is computed again.
    """

    def __init__(self, room: int = 2**31) -> None:
        self._room = room
        self._kept: dict[tuple[int, int], tuple[Tensor, Written]] = {}

    def get(self, layer: int, index: int) -> tuple[Tensor, Written] | None:
        """A block's output on a batch, and what its linears wrote, if it is kept."""
        return self._kept.get((layer, index))

    def keep(self, layer: int, index: int, output: Tensor, written: Written) -> None:
        """Keep it where there is room."""
        size = output.nbytes + sum(one.nbytes for one in written.outputs.values())
        if size <= self._room:
            self._room -= size
            self._kept[layer, index] = output, Written(outputs=dict(written.outputs))


class Stream:
    """A model's blocks on all batches, and the states before the block that is next.

    Args:
        model: not changed here.
        arch: knows its blocks.
        batches: ids [rows, seq] each.
        states: filled with the states before the first block.
        known: of this model on these batches, read and filled; None keeps nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        batches: Sequence[Tensor],
        states: ActivationStore,
        known: Known | None = None,
    ) -> None:
        self._known = known
        self.blocks, self.states = list(arch.blocks(model)), states
        self._calls: list[list[BlockCall]] = recorded_calls(model, arch.blocks(model), batches, states)
        self._writers: list[dict[Kind, nn.Module]] = [{} for _ in self.blocks]
        for place, name in writers(model, arch).items():
            self._writers[place.layer][place.kind] = model.get_submodule(name)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._calls)

    def linear(self, layer: int, kind: Kind) -> nn.Module:
        """The linear of a block that writes to the stream for a sub-layer."""
        return self._writers[layer][kind]

    def run(
        self, layer: int, index: int, hidden: Tensor, until: Kind | None = None, forced: Tensor | None = None
    ) -> tuple[Tensor, Written]:
        """One block on one batch.

        Args:
            layer: of the block.
            index: of the batch.
            hidden: what it reads [rows, seq, hidden].
            until: a sub-layer behind which nothing is wanted; the output is then what the block read.
            forced: what the attention is to have written.

        Raises NumericError if an output holds NaN or Inf.
        """
        written, output = Written(), hidden
        with _tapped(self._writers[layer], written, until, forced), suppress(_ReachedError):
            output = output_of(self.blocks[layer], BlockBatch(hidden, self._calls[index][layer]))
        check_states(layer, output)
        for kind, states in written.outputs.items():  # OPT's FFN works on tokens without rows
            written.outputs[kind] = states.reshape(*hidden.shape[:-1], -1)
        return output, written

    def own(self, layer: int, index: int, hidden: Tensor) -> tuple[Tensor, Written]:
        """As `run`, of the state that the model itself has there, which is not computed twice where it is known; what
        the linears read is not told then.
        """
        found = None if self._known is None else self._known.get(layer, index)
        if found is None:
            found = self.run(layer, index, hidden)
            if self._known is not None:
                self._known.keep(layer, index, *found)
        return found

    def is_sum(self, layer: int, index: int, hidden: Tensor) -> bool:
        """Whether a block, given the model's own state, outputs what it read plus what its linears write: no norm
        stands between.
        """
        output, written = self.own(layer, index, hidden)
        added = output.float() - hidden.float()
        missed = added - written.total(tuple(written.outputs))
        return float((missed.norm(dim=-1) - _ROUNDING * added.norm(dim=-1)).median()) <= 0

    def step(self, layer: int) -> None:
        """Run a block on every batch and keep what it outputs."""
        for index in range(len(self)):
            self.states.put(index, self.own(layer, index, self.states[index])[0])


@contextmanager
def _tapped(
    modules: Mapping[Kind, nn.Module], written: Written, until: Kind | None, forced: Tensor | None
) -> Iterator[None]:
    """Within the context calls of these linears are noted, that of the attention says what is forced, and one that is
    waited for ends the call of the block.
    """

    def hook(kind: Kind) -> Any:
        def called(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            if kind in written.outputs:  # a module of one block called twice is not a linear of a sub-layer
                raise AssertionError(f"{kind} was written twice in one block")
            given = output if forced is None or kind is not Kind.ATTENTION else forced.reshape(output.shape)
            written.inputs[kind] = arguments[0] if arguments else named["input"]
            written.outputs[kind] = given
            if kind is until:
                raise _ReachedError
            return given

        return called

    handles = [module.register_forward_hook(hook(kind), with_kwargs=True) for kind, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lifted(states: Tensor, kept: Sequence[int] | None, width: int) -> Tensor:
    """States in the dense model's dimensions, those that left being zero. kept: theirs in its numbering, or None."""
    if kept is None:
        return states
    whole = states.new_zeros(*states.shape[:-1], width)
    whole[..., torch.tensor(kept, device=states.device)] = states
    return whole


def cut(states: Tensor, kept: Sequence[int] | None) -> Tensor:
    """States in the dimensions that are left."""
    return states if kept is None else states[..., torch.tensor(kept, device=states.device)]
