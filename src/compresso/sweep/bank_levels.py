"""Blocks at levels of a bank: sub-layers that are gone do nothing, and what reads the units of others is fitted to
those that stay.

Weights are the least squares fit for the second moments of the dense stream, which the bank kept. They are computed
when a level is first asked for, and the last of them stay in memory.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.solve.bank import Level, SubLayer, weights_at
from compresso.solve.bank_choice import Menu
from compresso.solve.level_choice import Levels
from compresso.sweep.bank_file import read_moment
from compresso.sweep.emptied import EmptiedSubLayers
from compresso.sweep.targets import matrix

MAX_BYTES = 2**30
"""Most bytes of fitted weights kept."""


class BankLevels:
    """Puts a block at levels of a bank, whatever it was at before; an `Install`.

    Args:
        model: dense; its consumers' weights are kept beside it.
        arch: of it.
        menu: of levels.
        folder: of the bank, with second moments.
        damping: share of their mean diagonal added to second moments when weights are fitted.
        max_bytes: of fitted weights kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        menu: Menu,
        folder: Path,
        damping: float,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._menu, self._folder, self._damping = menu, folder, damping
        items = [(one.layer, (one.kind,)) for one in menu.sub_layers]
        self._emptied = EmptiedSubLayers(arch, arch.blocks(model), items)
        self._weights = {one.consumer: matrix(model, one.consumer).detach() for one in menu.sub_layers}
        self._dense = {name: weight.clone() for name, weight in self._weights.items()}
        self._places: dict[int, list[int]] = {}
        for place, one in enumerate(menu.sub_layers):
            self._places.setdefault(one.layer, []).append(place)
        self._fitted: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._room = max_bytes

    def __call__(self, block: int, levels: Levels, /) -> None:
        """See `compresso.sweep.candidates.Install`."""
        picked = [(self._menu.sub_layers[i], i, n) for i, n in zip(self._places.get(block, []), levels, strict=True)]
        self._emptied(block, tuple(int(self._menu.levels[i][n].gone) for _, i, n in picked))
        for one, i, n in picked:
            if not self._menu.levels[i][n].gone:
                self._weights[one.consumer].copy_(self._weight(one, n, self._menu.levels[i][n]))

    def fit_(self, levels: Levels) -> None:
        """Fit what stays of the whole model, and leave what is gone as it is, for somebody else to remove."""
        for n, (one, level) in zip(levels, self._menu.picked(levels), strict=True):
            if not level.gone:
                self._weights[one.consumer].copy_(self._weight(one, n, level))

    def _weight(self, sub_layer: SubLayer, n: int, level: Level) -> Tensor:
        """The consumer's weight [out, in] at its level n."""
        dense = self._dense[sub_layer.consumer]
        if not n:
            return dense
        key = (sub_layer.consumer, n)
        if key not in self._fitted:
            moment = read_moment(self._folder, sub_layer).to(dense.device)
            with torch.no_grad():
                self._fitted[key] = weights_at(sub_layer, level, dense, moment, self._damping)
            while len(self._fitted) > 1 and sum(one.nbytes for one in self._fitted.values()) > self._room:
                self._fitted.popitem(last=False)
        self._fitted.move_to_end(key)
        return self._fitted[key]
