"""Parameters that a checkpoint holds under other names, or in pieces: transformers stacks the experts of a mixture in
memory, while files hold linears, gate and up apart.

Pieces are read and written one by one, so that of a layer's experts memory holds the stack and one linear more.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a parameter is stored.

    Args:
        names: of the stored tensors; of a stack, every expert's first part, then every expert's second.
        shape: of the parameter: [experts, parts x rows, columns] of a stack; other parameters are one renamed piece.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]

    def joined(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, from its pieces."""
        if len(self.shape) != 3:
            return read(self.names[0])
        whole: Tensor | None = None
        for name, place in zip(self.names, self._places(), strict=True):
            piece = read(name)
            if whole is None:
                whole = torch.empty(self.shape, dtype=piece.dtype)
            whole[place].copy_(piece)
        assert whole is not None, "a stack has experts"
        return whole

    def split(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors, views of the parameter."""
        if len(self.shape) != 3:
            yield self.names[0], whole
            return
        for name, place in zip(self.names, self._places(), strict=True):
            yield name, whole[place]

    def _places(self) -> Iterator[tuple[int, slice]]:
        experts, rows, _ = self.shape
        parts = len(self.names) // experts
        for part in range(parts):
            for expert in range(experts):
                yield expert, slice(part * rows // parts, (part + 1) * rows // parts)


def pieces_of(model: PreTrainedModel, stored: Collection[str]) -> dict[str, Pieces]:
    """Of the model's parameters that are not stored under their own name, those that are stored otherwise.

    Args:
        model: on the meta device.
        stored: names of the checkpoint's tensors.
    """
    found: dict[str, Pieces] = {}
    for name, parameter in model.named_parameters():
        if name in stored:
            continue
        written: dict[str, Tensor] = revert_weight_conversion(model, {name: parameter.detach()})
        if all(one in stored for one in written):
            found[name] = Pieces(tuple(written), tuple(parameter.shape))
    return found
