"""SquareHead's loss on hidden states: squared differences from the teacher's, relative to how large these are.

Kurtic et al., arXiv 2310.06927, section 3. Layers differ in the size of their states by orders of magnitude, so that a
plain squared error hears the last few alone. `norm` says what an error is relative to:

    global     sum of squared differences / sum of squared teacher values, over all tokens that count: the paper's
    element    each difference / its own teacher value, averaged: small values count as much as large ones
    token_l2   as global, token by token, averaged: a token with massive activations (attention sinks) counts once
    none       mean squared difference

Terms of layers are summed, not averaged, as published. EPSILON keeps a teacher of zeros from dividing; it is added to
mean squares, so that the loss does not depend on how many tokens there are.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["global", "element", "none", "token_l2"]

EPSILON = 2**-7
"""Added to mean squares of the teacher: bfloat16's machine epsilon, as published."""


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor, norm: Norm = "global") -> Tensor:
    """The sum of the terms of all layers [], float32 or wider; gradients go to the student alone.

    Args:
        student, teacher: hidden states of as many layers, in pairs, each [batch, seq, width]; both behind blocks, or
            both behind the final norm.
        counted: the tokens that count [batch, seq], bool; padding does not.
        norm: as in this file's header.

    Raises:
        ValueError: unequal numbers of layers, unequal shapes, or no token counts.

    >>> states = [torch.ones(1, 2, 3)]
    >>> float(squarehead(states, states, torch.ones(1, 2, dtype=torch.bool)))
    0.0
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{len(student)} layers of the student and {len(teacher)} of the teacher; wanted pairs of them"
        )
    terms = [
        squared_error(ours[counted.to(ours.device)], theirs[counted.to(theirs.device)].to(ours.device), norm)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def squared_error(student: Tensor, teacher: Tensor, norm: Norm = "global") -> Tensor:
    """One layer's term [], float32 or wider, of the tokens' hidden states [n, width], n >= 1.

    Args:
        student, teacher: of equal shape and device.
        norm: as in this file's header.

    Raises:
        ValueError: unequal shapes, or no tokens.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"hidden states are {list(student.shape)} and {list(teacher.shape)}, wanted two of [tokens, width]; select"
            " the remaining dimensions"
        )
    if not len(student):
        raise ValueError("hidden states of 0 tokens have no distance; wanted at least one that is no padding")
    ours, theirs = wide(student), wide(teacher).detach()
    squares = (ours - theirs).square()
    if norm == "none":
        return squares.mean()
    if norm == "element":
        return (squares / (theirs.square() + EPSILON)).mean()
    if norm == "token_l2":
        return (squares.mean(-1) / (theirs.square().mean(-1) + EPSILON)).mean()
    return squares.mean() / (theirs.square().mean() + EPSILON)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
