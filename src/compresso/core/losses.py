"""The two terms of mask training: next-token cross-entropy and the Lagrangian that holds the size.

Unusual: only labelled positions are widened to float32, so a long prompt costs no memory for its logits.
"""

from typing import overload

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a position that carries no loss (prompt and padding)."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood [], float32, over labelled positions; the logits at s predict the label at s + 1.

    Args:
        logits: [batch, seq, vocab], any float dtype.
        labels: [batch, seq], int64; -100 is ignored.

    Raises ValueError if no position is labelled (the mean would be NaN) or the shapes disagree.
    """
    losses, _ = _token_losses(logits, labels)
    return losses.mean()


def next_token_loss_per_example(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each example's labelled positions [batch], float32.

    Raises ValueError if an example has no labelled position or the shapes disagree.
    """
    losses, labelled = _token_losses(logits, labels)
    counts = labelled.sum(dim=1)
    if bool((counts == 0).any()):
        raise ValueError(f"example {int((counts == 0).int().argmax())} of the batch has no labelled position")
    scattered = torch.zeros(labelled.shape, dtype=losses.dtype, device=losses.device).masked_scatter(labelled, losses)
    return scattered.sum(dim=1) / counts


@overload
def lagrangian(sparsity: Tensor, target: float, lambda1: Tensor, lambda2: Tensor) -> Tensor: ...
@overload
def lagrangian(sparsity: float, target: float, lambda1: float, lambda2: float) -> float: ...
def lagrangian(sparsity: Tensor | float, target: float, lambda1: Tensor | float, lambda2: Tensor | float) -> Tensor | float:
    """The penalty lambda1 (s - t) + lambda2 (s - t)^2 for expected sparsity s and target t (Compresso, arXiv 2310.05015; CoFi).

    Gates descend on it and both multipliers ascend: lambda2 can only grow, lambda1 turns where s crosses t.

    >>> lagrangian(0.25, 0.5, lambda1=2.0, lambda2=4.0)
    -0.25
    """
    gap = sparsity - target
    return lambda1 * gap + lambda2 * gap**2


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the labelled positions [labelled] and where they are [batch, seq - 1], bool."""
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"wanted logits [batch, seq, vocab] and labels [batch, seq], got {list(logits.shape)} and {list(labels.shape)}")
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    if not bool(labelled.any()):
        raise ValueError(f"no position after the first is labelled in a batch {list(labels.shape)}; was the response cut off?")
    losses = functional.cross_entropy(logits[:, :-1][labelled].float(), targets[labelled], reduction="none")
    return losses, labelled
