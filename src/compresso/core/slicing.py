"""The principal directions of a stream, and how wide it is once the least of them are left out (SliceGPT, Ashkboos et
al., arXiv 2401.15024, section 3.3).

A stream X [tokens, width] is described by its second moment H = X^T X. Of all orthonormal bases P [width, kept], that
of H's eigenvectors with the largest eigenvalues loses least of it: |X - X P P^T|^2 is the sum of the eigenvalues left
out. Everything is float64.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Principal:
    """An orthonormal basis of a stream.

    Args:
        basis: directions as columns [width, width], float64, those with the largest share first.
        shares: of the second moment's trace that lie in each [width], descending, without the damping.
    """

    basis: Tensor
    shares: Tensor

    def lost(self, kept: int) -> float:
        """Share of the squared norm that lies outside the first directions."""
        return float(self.shares[kept:].sum())


def sliced_width(width: int, keep: float, multiple_of: int) -> int:
    """How many dimensions stay of a stream: a share, rounded down to a multiple; all of them if the share is 1.

    >>> [sliced_width(4096, keep, 8) for keep in (0.9, 0.8, 0.75, 0.7)], sliced_width(576, 1.0, 50)
    ([3680, 3272, 3072, 2864], 576)
    """
    if keep >= 1:
        return width
    kept = int(keep * width * (1 + 1e-12))  # a share such as .7 lies below what it stands for
    return kept - kept % multiple_of


def principal(moment: Tensor, damping: float, centred: bool) -> Principal:
    """The principal directions of a stream.

    Args:
        moment: sum of x x^T over tokens [width, width], of any floating dtype.
        damping: share of its mean diagonal that is added to it, at least 0; it changes no direction that the moment
            knows, and orders none.
        centred: the mean over the dimensions is taken off each x, as LayerNorm does: the direction (1, ..., 1) is the
            last one then, whatever the damping.

    Raises:
        ValueError: the moment is not finite, or nothing was seen.
    """
    wide = moment.double()
    if centred:
        wide = without_mean(without_mean(wide).T)
    wide = (wide + wide.T) / 2
    mean = float(wide.diagonal().mean())
    if not bool(torch.isfinite(wide).all()) or mean <= 0:
        raise ValueError(f"a stream of mean square {mean:g} has no directions")
    added = torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * (damping * mean)
    damped = wide + (without_mean(added) if centred else added)
    _, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(damped))  # pyright: ignore[reportUnknownMemberType]
    basis = vectors.flip(1)
    shares = (basis * (wide @ basis)).sum(dim=0).clamp(min=0) / wide.trace()
    return Principal(basis, shares)


def without_mean(rows: Tensor) -> Tensor:
    """Rows [..., width] less their means over the width."""
    return rows - rows.mean(dim=-1, keepdim=True)
