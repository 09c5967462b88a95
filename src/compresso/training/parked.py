"""A model whose weights lie on disk for a while, so that another has the memory to itself."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from compresso.checkpoint.atomic import new_file
from compresso.checkpoint.storage import storage_errors


@contextmanager
def parked_(model: nn.Module, file: Path) -> Iterator[None]:
    """Within the context the model's parameters and buffers are empty; behind it they are, bit for bit, as before.

    A tied tensor is written once; different tensors over the same memory, of which none could be given back alone, stay
    there. The model must not be called within.

    Args:
        model: live; its modules stay where they are.
        file: removed at the end; one that a killed process left is replaced.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: writing is not allowed there.
    """
    every = dict(chain(model.named_parameters(), model.named_buffers()))
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in every.values())
    tensors = {name: one for name, one in every.items() if sharing[one.untyped_storage().data_ptr()] == 1}
    devices = {name: tensor.device for name, tensor in tensors.items()}
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as written:
            save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, written)
    try:
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        yield
    finally:
        with safe_open(str(file), framework="pt") as found:
            for name, tensor in tensors.items():
                tensor.data = found.get_tensor(name).clone().to(devices[name])  # what was read lies over the file
        file.unlink()
