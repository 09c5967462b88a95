"""A model larger than memory: modules without weights, which come from disk block by block.

During a sweep one block is in memory; for measuring, accelerate's hooks read each module's weights when its turn comes
and drop them after.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from compresso.checkpoint.expert_pieces import pieces_of
from compresso.checkpoint.kinds import from_config
from compresso.checkpoint.source import Source
from compresso.checkpoint.store import Store
from compresso.edit.stock import as_stock
from compresso.errors import CheckpointError


class Offloaded:
    """A model on the meta device, and where its weights are read.

    Args:
        source: opened with its weights.
        dtype: of the weights in memory.
        device: where blocks are computed.

    Raises CheckpointError if the stored names are not those of the model's own parameters.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        with init_empty_weights(include_buffers=False):
            model = from_config(source.config, dtype=dtype)
        model.tie_weights()  # which empty weights forget
        self.model: PreTrainedModel = as_stock(model).eval()
        self.device = device
        plain = type(self.model)  # whose `device` is that of its first parameter, where nothing can be computed
        self.model.__class__ = type(
            plain.__name__, (plain,), {"device": property(lambda _: device), "__module__": plain.__module__}
        )
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        names = [name for name, _ in self.model.named_parameters()]
        owners = {id(self._empty[name]): name for name in names}
        tied = {name: owners[id(p)] for name, p in self._empty.items() if owners[id(p)] != name}
        self.store = Store(source, names, dtype, tied, pieces_of(self.model, source.tensors))
        persistent = [name for name, _ in self.model.named_buffers() if name in self.model.state_dict()]
        self.buffers = Store(source, persistent, torch.float32, {})
        lacking = [name for name in names if name not in self.store]
        if lacking := lacking + [name for name in persistent if name not in self.buffers]:
            raise CheckpointError(
                f"{source.name} has no tensor '{lacking[0]}'; its names are not those of {type(self.model).__name__}. "
                "Open and save it once with transformers, or run without --offload"
            )
        for where, module in self.model.named_modules():  # rotary tables and the like are computed, not read
            for name, buffer in list(module.named_buffers(recurse=False)):
                if (full := f"{where}.{name}") in self.buffers:
                    buffer = self.buffers[full].to(buffer.dtype)
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Within the context, these parameters are in memory."""
        try:
            for name in names:
                self._put(name, nn.Parameter(self.store[name].to(self.device), requires_grad=False))
            yield
        finally:
            for name in names:
                self._put(name, self._empty[name])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, own = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(own, parameter)

    def of_block(self, block: nn.Module) -> list[str]:
        """Names of a block's parameters."""
        root = next(name for name, module in self.model.named_modules() if module is block)
        return [f"{root}.{name}" for name, _ in block.named_parameters()]

    def around(self, blocks: nn.ModuleList) -> list[str]:
        """Names of what the body has outside of its blocks: embeddings, the last norm; not the head."""
        inside = {name for block in blocks for name in self.of_block(block)}
        body = {id(parameter) for parameter in self.model.base_model.parameters()}
        return [
            name for name, parameter in self.model.named_parameters() if name not in inside and id(parameter) in body
        ]

    def tensors(self) -> Store:
        """The weights by name, read when they are asked for."""
        return self.store

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context the model can be called, each module's weights being read for every call."""
        self.attach_()
        try:
            yield
        finally:
            remove_hook_from_submodules(self.model)
            for name, parameter in self._empty.items():  # tied ones are one again
                self._put(name, parameter)

    def attach_(self) -> None:
        """Let the model be called from now on, each module's weights being read for every call."""
        attach_align_device_hook(self.model, execution_device=self.device, offload=True, weights_map=self.store)
