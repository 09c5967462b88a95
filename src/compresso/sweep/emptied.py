"""Blocks with and without their attention and MLP, put together and taken apart again without a copy of a weight."""

from collections.abc import Sequence

from torch import nn

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.solve.level_choice import Levels


class EmptiedSubLayers:
    """Puts a block at levels: 0 keeps a sub-layer, 1 takes it out, as removing it would.

    Args:
        arch: of the model.
        blocks: of the model, whole.
        items: block of each item, and the kinds of sub-layers there (attention, mlp or both) that it stands for, in the
            order of levels.
    """

    def __init__(self, arch: Arch, blocks: nn.ModuleList, items: Sequence[tuple[int, Sequence[Kind]]]) -> None:
        self._arch, self._blocks = arch, blocks
        self._kinds = [[kinds for block, kinds in items if block == here] for here in range(len(blocks))]
        self._whole = [[(module, dict(module._modules)) for module in block.modules()] for block in blocks]

    def __call__(self, block: int, levels: Levels, /) -> None:
        """See `Install`."""
        for module, children in self._whole[block]:
            module._modules.clear()
            module._modules.update(children)
        for kinds, level in zip(self._kinds[block], levels, strict=True):
            for kind in kinds if level else ():
                self._arch.empty_(self._blocks[block], kind)
