"""The terms of mask training: cross-entropy of next tokens or of labels, and the Lagrangian that holds the size.

Unusual: where less than half of the positions are labelled, only their logits are gathered and widened to float32, so
that a long prompt costs no memory; where most are, gathering would cost more than it saves, and the loss runs over all
of them in place.
"""

from typing import overload

from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a position that carries no loss (prompt and padding)."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood [], float32, over labelled positions; the logits at s predict the label at s + 1.

    Args:
        logits: [batch, seq, vocab], any float dtype.
        labels: [batch, seq], int64; -100 is ignored.

    Raises:
        ValueError: no position is labelled (the mean would be NaN) or the shapes disagree.
    """
    labelled, count = _labelled(logits, labels)
    if 2 * count > labelled.numel():
        shifted = functional.pad(
            labels[:, 1:], (0, 1), value=IGNORED
        )  # as long as the logits, so that these are not copied
        return functional.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORED)
    return _token_losses(logits, labels, labelled).mean()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood [], float32, of the labels of whole examples.

    Args:
        logits: [batch, classes], any float dtype.
        labels: [batch], int64; -100 is ignored.

    Raises ValueError if no example is labelled (the mean would be NaN) or the shapes disagree.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"wanted logits [batch, classes] and labels [batch], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not bool((labels != IGNORED).any()):
        raise ValueError(f"no example is labelled in a batch of {len(labels)}; give examples with a label")
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood [], float32, of labelled tokens, each predicted where it stands.

    Args:
        logits: [batch, seq, vocab], any float dtype.
        labels: [batch, seq], int64; -100 is ignored.

    Raises ValueError if no token is labelled (the mean would be NaN) or the shapes disagree.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"wanted logits [batch, seq, vocab] and labels [batch, seq], got {list(logits.shape)} and"
            f" {list(labels.shape)}"
        )
    labelled = labels != IGNORED
    if not bool(labelled.any()):
        raise ValueError(f"no token is labelled in a batch {list(labels.shape)}; give texts with masked tokens")
    return functional.cross_entropy(logits[labelled].float(), labels[labelled])


def span_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood [], float32, of where answers begin and end.

    Args:
        logits: of each token to be the first and the last [batch, seq, 2], any float dtype.
        labels: the two places of each example [batch, 2], int64; -100 is ignored.

    Raises ValueError if no place is labelled (the mean would be NaN) or the shapes disagree.
    """
    if logits.dim() != 3 or logits.shape[2] != 2 or labels.shape != (len(logits), 2):
        raise ValueError(
            f"wanted logits [batch, seq, 2] and labels [batch, 2], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not bool((labels != IGNORED).any()):
        raise ValueError(f"no answer is labelled in a batch of {len(labels)}; give questions with answers")
    return functional.cross_entropy(logits.float().transpose(1, 2).flatten(0, 1), labels.flatten())


@overload
def lagrangian(sparsity: Tensor, target: float, lambda1: Tensor, lambda2: Tensor) -> Tensor: ...
@overload
def lagrangian(sparsity: float, target: float, lambda1: float, lambda2: float) -> float: ...
def lagrangian(
    sparsity: Tensor | float, target: float, lambda1: Tensor | float, lambda2: Tensor | float
) -> Tensor | float:
    """The penalty lambda1 (s - t) + lambda2 (s - t)^2 for expected sparsity s and target t (Compresso, arXiv
    2310.05015; CoFi).

    Gates descend on it and both multipliers ascend: lambda2 can only grow, lambda1 turns where s crosses t.

    >>> lagrangian(0.25, 0.5, lambda1=2.0, lambda2=4.0)
    -0.25
    """
    gap = sparsity - target
    return lambda1 * gap + lambda2 * gap**2


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Which positions predict a label [batch, seq - 1], bool, and how many do, for which a device is waited for once.

    Raises ValueError if none does or the shapes disagree.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"wanted logits [batch, seq, vocab] and labels [batch, seq], got {list(logits.shape)} and"
            f" {list(labels.shape)}"
        )
    labelled = labels[:, 1:] != IGNORED
    count = int(labelled.sum())
    if not count:
        raise ValueError(
            f"no position after the first is labelled in a batch {list(labels.shape)}; was the response cut off?"
        )
    return labelled, count


def _token_losses(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Losses of the labelled positions [labelled], float32."""
    return functional.cross_entropy(logits[:, :-1][labelled].float(), labels[:, 1:][labelled], reduction="none")
