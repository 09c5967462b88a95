"""What the blocks of a model are called with, recorded in one pass and replayed block by block.

The blocks hand their input on in that pass and see nothing of it: mask, positions, rotary tables, whatever the version
of transformers or the architecture passes, depend on the token ids alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.sweep.activation_store import ActivationStore


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden states."""

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict[str, Any])


class _HandedOn(Tensor):
    """What a stand-in returns: hidden states, and their own first entry for bodies that take a block's first output."""

    def __getitem__(self, index: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self if type(index) is int and index == 0 else super().__getitem__(index)


def recorded_calls(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Tensor], states: ActivationStore
) -> list[list[BlockCall]]:
    """Record what each block is called with.

    Args:
        model: its body is run once a batch, with blocks that hand their input on.
        blocks: of the model.
        batches: ids [rows, seq] each.
        states: the hidden states before the first block are added to it, by batch.

    Returns:
        The calls by batch and layer; equal arguments of many batches are held once.
    """
    calls: list[list[BlockCall]] = []
    known: dict[tuple[int, str], Any] = {}

    def shared(value: Any, key: tuple[int, str]) -> Any:
        """The value met before under a key if it is equal, so that equal tables of many batches are held once."""
        if key in known and _same(known[key], value):
            return known[key]
        known[key] = value
        return value

    def stand_in(layer: int) -> Callable[..., Tensor]:
        def forward(*arguments: Any, **named: Any) -> Tensor:
            hidden: Tensor = arguments[0] if arguments else named.pop("hidden_states")
            hidden = hidden.as_subclass(Tensor)
            if layer == 0:
                states.put(len(calls) - 1, hidden)
            rest = tuple(shared(value, (layer, str(i))) for i, value in enumerate(arguments[1:]))
            calls[-1].append(BlockCall(rest, {key: shared(value, (layer, key)) for key, value in named.items()}))
            return hidden.as_subclass(_HandedOn)

        return forward

    try:
        for layer, block in enumerate(blocks):
            block.forward = stand_in(layer)  # on the instance, before the class's own
        for ids in batches:
            calls.append([])
            model.base_model(input_ids=ids.to(states.device), use_cache=False)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return calls


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal: tensors by value, tuples and dicts by their parts, all else by
    identity.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and one.device == other.device
            and torch.equal(one, other)
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        left, right = cast(tuple[Any, ...], one), cast(tuple[Any, ...], other)
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return one is other
