"""A linear whose share of zeros is learned, and perhaps the range of its grid: what it computes with meanwhile, and
what is left of it at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresso.core.learned_clipping import LEAST_SHARE, clipped_rounding, learned_grid
from compresso.core.learned_sparsity import (
    counts_of,
    first_ranks,
    learned_mask,
    mixture,
    prune_probability,
    ranks_of,
    shares,
)
from compresso.core.obs import Factor, Quantize, column_sweep
from compresso.sweep.targets import matrix


@dataclass(frozen=True)
class Mixing:
    """How shares come from logits.

    Args:
        rates: candidates [D], descending.
        start: logits before the first step [D].
        by_row: rows have logits of their own; else the matrix has one vector.
        smooth: logits go through a sigmoid first.
    """

    rates: Tensor
    start: Tensor
    by_row: bool = False
    smooth: bool = False


class LearnedLinear:
    """One linear of a block while its zeros are learned; its weight is changed by `bake_` alone.

    Args:
        model, name: of which linear, by full name.
        scores: importance of its entries [out, in]; only their order in each row is kept.
        mixing: how shares come from logits.
        bits: of a grid whose range is learned for each row; None rounds nothing.
    """

    def __init__(self, model: nn.Module, name: str, scores: Tensor, mixing: Mixing, bits: int | None = None) -> None:
        self.name, self._mixing, self._bits = name, mixing, bits
        self._turned = isinstance(model.get_submodule(name), Conv1D)
        self.weight = matrix(model, name)
        self.rows, self.columns = self.weight.shape
        self._ranks, self._rates = ranks_of(scores), mixing.rates.to(self.weight.device)
        groups = self.rows if mixing.by_row else 1
        self.logits = mixing.start.to(self.weight.device, torch.float32).repeat(groups, 1).requires_grad_(True)
        ones = self.weight.new_ones((self.rows, 1), dtype=torch.float32)
        self.clips: tuple[Tensor, ...] = (
            () if bits is None else (ones.clone().requires_grad_(True), ones.clone().requires_grad_(True))
        )

    @torch.no_grad()
    def row_shares(self) -> Tensor:
        """The learned share of zeros of each row [out], float64."""
        return shares(mixture(self.logits, self._mixing.smooth), self._rates).expand(self.rows)

    def masked(self) -> tuple[Tensor, Tensor]:
        """The weight to compute with, as the module stores it, and how many zeros its shares stand for, float64 [].

        Both have gradients for logits and ends.
        """
        mixed = mixture(self.logits, self._mixing.smooth)
        share = shares(mixed, self._rates)
        probability = prune_probability(mixed, self._rates, self.columns).float()
        mask = learned_mask(probability, self._ranks, counts_of(share.detach(), self.columns))
        weight = self._rounded().mul(mask).to(self.weight.dtype)
        return (weight.T if self._turned else weight), share.mean() * (self.rows * self.columns)

    @torch.no_grad()
    def hold_clips_(self) -> None:
        """Bring learned ends of ranges back to where a grid can have them."""
        for clip in self.clips:
            clip.clamp_(LEAST_SHARE, 1)

    @torch.no_grad()
    def bake_(self, counts: Tensor, factor: Factor | None = None) -> Mapping[str, float]:
        """Zero the first entries of each row, round what is left.

        Args:
            counts: of each row [out].
            factor: of the linear's inputs, where what stays is to make up for what leaves (`core.obs`).

        Returns:
            Facts about its zeros.
        """
        gone = first_ranks(self._ranks, counts)
        if factor is None:
            self.weight.copy_(self._rounded().masked_fill(gone, 0))
        else:
            self.weight.copy_(self._compensated(gone, factor))
        facts = {
            "learned": float(self.row_shares().mean()),
            "share": int(counts.sum()) / self.weight.numel(),
            "least_of_a_row": int(counts.min()) / self.columns,
            "most_of_a_row": int(counts.max()) / self.columns,
        }
        if self.clips:
            facts |= dict(zip(("low", "high"), (float(clip.mean()) for clip in self.clips), strict=True))
        return facts

    def _compensated(self, gone: Tensor, factor: Factor) -> Tensor:
        """The weight without some entries, the others moved to make up for them [out, in], float32."""
        return column_sweep(
            self.weight.float(),
            factor,
            choose=lambda scores, j: gone[:, j : j + scores.shape[1]],
            quantize=None if self._bits is None else self._rounding(self._bits),
        ).weight

    def _rounding(self, bits: int) -> Quantize:
        """How a column of moved weights is rounded: to the learned grids."""
        low, high = self.clips
        grid = learned_grid(self.weight.float(), low, high, bits)
        return lambda left, j: grid.round(left[:, :1], j).squeeze(1)

    def _rounded(self) -> Tensor:
        """The whole weight on its grids [out, in], float32; as it is where nothing rounds."""
        if self._bits is None:
            return self.weight.float()
        low, high = self.clips
        return clipped_rounding(self.weight.float(), low, high, self._bits)
