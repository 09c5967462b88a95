"""Activations between two blocks of a sweep, kept on the device, in the machine's memory or on disk."""

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Place = Literal["device", "cpu", "disk"]


class ActivationStore:
    """A list of tensors [batch, seq, hidden] that is read and written one at a time.

    Args:
        place: "device" (where they are used), "cpu", or "disk": one file each in `folder`, so that memory holds one of
            them.
        device: where they are used.
        folder: of "disk"; emptied at the beginning and removed by `discard`.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path) -> None:
        self._place, self.device, self._folder = place, device, folder
        self._held: list[Tensor | Path] = []
        if place == "disk":
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Tensor:
        """The tensor, on the device. Raises IndexError beyond the end."""
        held = self._held[index]
        return (load_file(held)["states"] if isinstance(held, Path) else held).to(self.device)

    def put(self, index: int, states: Tensor) -> None:
        """Replace a tensor, or add one at the end."""
        held: Tensor | Path
        if self._place == "disk":
            held = self._folder / f"{index:06d}.safetensors"
            save_file({"states": states.contiguous()}, held)
        else:
            held = states if self._place == "device" else states.cpu()
        if index == len(self._held):
            self._held.append(held)
        else:
            self._held[index] = held

    def discard(self) -> None:
        """Forget everything."""
        self._held.clear()
        if self._place == "disk":
            shutil.rmtree(self._folder, ignore_errors=True)
