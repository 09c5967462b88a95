"""Pruned weights of each layer at several levels, on disk: a model is put together from them, one layer at a time.

One safetensors file a layer holds the weights of all levels and, as the last level, the dense ones. It is whole or
absent, and known by a key of what it was made from; one of another key is made again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from compresso.checkpoint.atomic import write_bytes
from compresso.solve.level_choice import Levels
from compresso.sweep.targets import Groups, weight_of


class LevelStore:
    """The levels of some layers.

    Args:
        folder: where files lie; made with the first.
        key: of what the levels were made from.
        model: whose weights are set.
        groups: the linears that have levels.
    """

    def __init__(self, folder: Path, key: str, model: nn.Module, groups: Groups) -> None:
        self._folder, self._key, self._model = folder, key, model
        self._names = {layer: [name for group in here for name in group.names] for layer, here in groups.items()}

    def has(self, layer: int) -> bool:
        """Whether a layer's levels are there, whole and of this key."""
        try:
            with safe_open(str(self._file(layer)), framework="pt") as file:
                return (file.metadata() or {}).get("key") == self._key
        except (OSError, SafetensorError):
            return False

    def write(self, layer: int, levels: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep a layer's levels, by linear, and its present weights as the last one.

        Raises:
            ResourceError: the disk refuses.
        """
        dense = {name: weight_of(self._model, name).detach() for name in self._names[layer]}
        tensors = {
            f"{level}.{name}": weights[name].cpu().contiguous()
            for level, weights in enumerate([*levels, dense])
            for name in self._names[layer]
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._file(layer), save(tensors, {"key": self._key}))

    @torch.no_grad()
    def install(self, block: int, levels: Levels) -> None:
        """Give a layer the weights of a level; layers without linears of ours have none."""
        for level in levels:
            with safe_open(str(self._file(block)), framework="pt") as file:
                for name in self._names[block]:
                    weight_of(self._model, name).copy_(file.get_tensor(f"{level}.{name}"))

    def _file(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:06d}.safetensors"
