"""Logits of the tokens that a masked language model is asked for, and of no others.

A sixth of the positions are asked for, and logits are as wide as the vocabulary: for a small encoder those of all
positions cost as much as its layers, and most of the memory.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compresso.core.losses import IGNORED

FIRST_OF_HEAD = ("cls", "lm_head", "vocab_transform")
"""What reads the last hidden states: BERT's, RoBERTa's, DistilBERT's."""


def asked_logits(
    logits_of: Callable[[Callable[..., object], Mapping[str, Tensor]], Tensor],
    model: Callable[..., object],
    batch: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Logits [1, asked, vocab] and labels [1, asked] of a batch, as if it were one row of what is asked for.

    Args:
        logits_of: what a model says of a batch.
        model: a masked language model, with adapters or without; of one whose head has another name all logits are made
            first.
        batch: what it reads, and labels [batch, seq].
    """
    asked = batch["labels"] != IGNORED
    head = _head(model)
    if head is None:
        logits = logits_of(model, batch)[asked]
    else:
        with _reading(head, asked):
            logits = logits_of(model, batch)
    return logits.unsqueeze(0), batch["labels"][asked].unsqueeze(0)


def _head(model: Callable[..., object]) -> nn.Module | None:
    """The outermost module that begins a head; None where there is none of a known name."""
    if not isinstance(model, nn.Module):
        return None
    for name, module in model.named_modules():  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if str(name).rpartition(".")[2] in FIRST_OF_HEAD:  # pyright: ignore[reportUnknownArgumentType]
            assert isinstance(module, nn.Module)
            return module
    return None


@contextmanager
def _reading(head: nn.Module, asked: Tensor) -> Generator[None]:
    """Within the context a head reads the positions asked for."""

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][asked.to(inputs[0].device)], *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
