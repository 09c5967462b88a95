"""One block of a sweep: run on all calibration batches, or visited by an edit that learns from it with gradients.

What block-wise learning (BESA, arXiv 2402.16880, equation 1) and local reconstruction need: the block, what it reads
behind the edited blocks before it, and what it is to output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compresso.observe.folds import Stats
from compresso.observe.overflow import check_states
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.calls import BlockCall
from compresso.sweep.targets import Group


class Reference(StrEnum):
    """Whose outputs are a visited block's dense outputs."""

    BLOCK = "block"
    """Of the dense block, for the inputs that the edited blocks before it give. Costs no forward of its own."""
    MODEL = "model"
    """Of the dense model, behind the same block. Costs one forward of each block from the first edited one on."""


@dataclass(frozen=True)
class BlockBatch:
    """What a block is called with for the rows of one batch.

    Args:
        hidden: [rows, seq, hidden], not to be changed in place.
        call: everything else.
    """

    hidden: Tensor
    call: BlockCall


class BlockRunner:
    """Runs one block on all batches.

    Args:
        block: the module.
        layer: its number.
        calls: what it is called with, by batch.
        states: hidden states by batch, [rows, seq, hidden] each.
    """

    def __init__(self, block: nn.Module, layer: int, calls: Sequence[BlockCall], states: ActivationStore) -> None:
        self.block, self.layer, self._calls, self._states = block, layer, calls, states

    def __len__(self) -> int:
        return len(self._calls)

    def on(self, states: ActivationStore) -> "BlockRunner":
        """The same block on other states."""
        return BlockRunner(self.block, self.layer, self._calls, states)

    def batch(self, index: int) -> BlockBatch:
        """What the block reads of one batch."""
        return BlockBatch(self._states[index], self._calls[index])

    def run(self, keep: bool, into: ActivationStore | None = None) -> None:
        """Run the block on every batch.

        Args:
            keep: put what the block outputs in the place of the states.
            into: put it here instead, by batch.

        Raises:
            NumericError: an output holds NaN or Inf.
        """
        kept = self._states if into is None else into
        for i in range(len(self)):
            outputs = output_of(self.block, self.batch(i))
            check_states(self.layer, outputs)
            if keep:
                kept.put(i, outputs)


@dataclass(frozen=True)
class BlockVisit:
    """A block that an edit looks at as a whole, gradients being on.

    Nothing in the block requires a gradient at first; an edit turns it on for what it learns, and it is turned off
    again when the edit returns. An edit that draws random numbers takes them from a generator seeded by `layer`, so
    that a resumed sweep draws the same ones.

    Args:
        layer: number of the block.
        block: the module, its weights in memory and still dense.
        groups: the linears to work on, as `chosen` gave them.
        seen: name of a group's first linear -> the statistic of what the dense block's linears read; empty where the
            edit asked for none.
        dense: the dense outputs, by batch.
        runner: holds what the block reads.
        seen_dense: as `seen`, of the block in the dense model, where the edit asked for it.
    """

    layer: int
    block: nn.Module
    groups: Sequence[Group]
    seen: Mapping[str, Stats]
    dense: ActivationStore = field(repr=False)
    runner: BlockRunner = field(repr=False)
    seen_dense: Mapping[str, Stats] = field(default_factory=dict[str, Stats])

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.runner)

    def batch(self, index: int) -> BlockBatch:
        """What the block is called with for one batch."""
        return self.runner.batch(index)

    def dense_output(self, index: int) -> Tensor:
        """The dense output of one batch [rows, seq, hidden], not to be changed in place."""
        return self.dense[index]

    def batches(self) -> Iterator[BlockBatch]:
        """What the block is called with, batch by batch."""
        return (self.batch(i) for i in range(len(self)))

    def dense_outputs(self) -> Iterator[Tensor]:
        """The dense outputs, batch by batch."""
        return (self.dense_output(i) for i in range(len(self)))

    def run(self, batch: BlockBatch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the block as it is now.

        Args:
            batch: what it is called with.
            parameters: name within the block, such as "mlp.up_proj.weight" -> a tensor to compute with instead, such as
                a weight under a learned mask.

        Returns:
            Its output [rows, seq, hidden].
        """
        return output_of(self.block, batch, parameters)


@dataclass(frozen=True)
class BlockEdit:
    """An edit that visits whole blocks.

    Args:
        edit: changes weights of the visited block's linears in place; returns what is to be noted, JSON values by name.
        reference: whose outputs are the dense ones.
        looks_dense: whether the statistic is taken of the dense model, too; its outputs must be the reference.
        reads_batches: whether it looks at batches, too, and not at statistics alone; then one process has to have all.
    """

    edit: Callable[[BlockVisit], Mapping[str, Any]]
    reference: Reference = Reference.BLOCK
    looks_dense: bool = False
    reads_batches: bool = True


def output_of(block: nn.Module, batch: BlockBatch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Call a block on a batch, with some parameters replaced: hidden states [rows, seq, hidden]."""
    if parameters:
        given = functional_call(block, dict(parameters), (batch.hidden, *batch.call.arguments), batch.call.named)
    else:
        given = block(batch.hidden, *batch.call.arguments, **batch.call.named)
    return cast(Tensor, given[0] if isinstance(given, tuple) else given)


@contextmanager
def learning(block: nn.Module) -> Iterator[None]:
    """Within the context gradients are on, and none of a block's parameters requires one until asked to."""
    required = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    block.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
