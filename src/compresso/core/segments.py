"""Losses and counts of a class for each pixel.

Online hard example mining (OHEM) as the code of arXiv 2309.02617 has it: of the pixels' losses in descending order, if
the one at index n_min (the first has 0) is above -log 0.7, the mean of all above -log 0.7, else of the n_min largest;
n_min is the number of pixels of the batch over 16. Departure: pixels that are passed over are left out before the
losses are ordered; there they stand at the end as zeros, and are in the mean where fewer than n_min pixels have
a class.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.losses import IGNORED

HARD = -math.log(0.7)
"""The loss of a pixel whose class is given .7."""
_SHARE = 16


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [batch, classes, h, w] in the size of labels [batch, height, width], bilinear, float32.

    Raises ValueError if they are of other examples.
    """
    if logits.dim() != 4 or labels.dim() != 3 or len(logits) != len(labels):
        raise ValueError(
            f"wanted logits [batch, classes, h, w] and labels [batch, height, width], got {list(logits.shape)} and"
            f" {list(labels.shape)}"
        )
    return functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)


def ohem(losses: Tensor, n_min: int) -> Tensor:
    """The mean of the hard ones among losses [n], n > 0; as in this file's header."""
    ordered = losses.sort(descending=True).values
    if n_min < len(ordered) and bool(ordered[n_min] > HARD):
        return ordered[ordered > HARD].mean()
    return ordered[: max(n_min, 1)].mean()


def ohem_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """OHEM of the cross-entropy of each pixel [], float32.

    Args:
        logits: [batch, classes, h, w], any float dtype and size.
        labels: [batch, height, width], int64; -100 is passed over.

    Raises ValueError if no pixel has a class, or the shapes disagree.
    """
    wide = at_labels(logits, labels)
    if not bool((labels != IGNORED).any()):
        raise ValueError(f"no pixel of {len(labels)} label maps has a class; give maps with some")
    losses = functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
    return ohem(losses[labels != IGNORED], labels.numel() // _SHARE)


def hard_pixels(logits: Tensor, classes: Tensor, of: int) -> Tensor:
    """OHEM of the cross-entropy of pixels that have a class [], float32.

    Args:
        logits: [n, classes], n > 0.
        classes: [n], int64.
        of: how many pixels the batch has, those that are passed over among them.
    """
    return ohem(functional.cross_entropy(logits.float(), classes, reduction="none"), of // _SHARE)


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often a pixel of each class was given each [classes (its own), classes (given)], int64.

    Args:
        found, labels: of the same shape; a label of -100 is passed over.
        classes: how many there are.
    """
    known = labels != IGNORED
    pairs = labels[known] * classes + found[known]
    return torch.bincount(pairs.flatten(), minlength=classes * classes).reshape(classes, classes)


def intersection_over_union(counted: Tensor) -> Tensor:
    """Of each class [classes], float64, from a confusion matrix; NaN for one that neither occurs nor is given."""
    both = counted.diag().double()
    return both / (counted.sum(0) + counted.sum(1) - counted.diag()).double()
