"""A model in any widths, with weights of no meaning: time depends on shapes alone.

All such models lie in one piece of memory, which each of them fills from the start: as many as are compared take the
memory of the largest.
"""

from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.kinds import from_config
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import Source
from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, ResourceError

Widths = Sequence[tuple[int, int]]
"""Key/value heads and channels of each layer."""


class ShapedModels:
    """Makes models of a source's kind in widths of their own.

    Args:
        source: whose shapes they start from; its weights are not read.
        dtype, device: of the models.

    Raises:
        ResourceError: the largest does not fit into memory.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self._buffers = _buffers(source, device)
        whole = meta_model(source)
        self.attention = _attention(whole)
        numbers = sum(parameter.numel() for parameter in whole.parameters())
        generator = torch.Generator().manual_seed(0)
        try:
            some = torch.empty(min(numbers, 2**20)).normal_(0, 0.02, generator=generator).to(dtype)
            self._memory = some.to(device).repeat(-(-numbers // some.numel()))
        except (MemoryError, RuntimeError) as error:
            needed = numbers * dtype.itemsize
            raise ResourceError(
                f"{source.name} needs {needed / 1e9:.1f} GB on {device}, which are not free; give --dtype bfloat16"
            ) from error

    def model(self, widths: Widths) -> PreTrainedModel:
        """The model whose layers have these widths, the first ones; 0 for a sub-layer that is not there.

        A bias outlives the last unit of a sub-layer, so that one without units leaves as a whole. Where layers cannot
        leave, those behind the first ones lose both sub-layers.
        """
        model = meta_model(self.source)
        axes = arch_for(model.config).axes(model)
        shrink_(model, axes, _plan(axes, widths))
        self._fill_(model)
        return model.eval()

    def _fill_(self, model: PreTrainedModel) -> None:
        """Give every parameter a place in the memory, tied ones one place, and every buffer its values."""
        begun, places = 0, dict[int, nn.Parameter]()
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in places:
                    numbers = self._memory[begun : begun + parameter.numel()]
                    places[id(parameter)] = nn.Parameter(numbers.view(parameter.shape), requires_grad=False)
                    begun += parameter.numel()
                setattr(module, name, places[id(parameter)])
        owners = dict(model.named_modules())
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                owner, _, own = name.rpartition(".")
                owners[owner].register_buffer(own, self._buffers[name], persistent=False)


def _plan(axes: Sequence[Axis], widths: Widths) -> Plan:
    """What leaves of a model for its layers to have these widths."""
    whole = {Kind.ATTENTION: 0, Kind.MLP: 1}
    units = {Kind.HEAD: 0, Kind.CHANNEL: 1}
    goes = not any(axis.kind == Kind.LAYER for axis in axes)
    kept: dict[str, tuple[int, ...]] = {}
    for axis in axes:
        if axis.kind == Kind.LAYER:
            kept[axis.name] = tuple(range(len(widths)))
        elif axis.kind in whole:
            stays = [bool(one[whole[axis.kind]]) for one in widths] + [not goes] * (axis.size - len(widths))
            kept[axis.name] = tuple(i for i, there in enumerate(stays) if there)
        elif axis.kind in units and axis.layer is not None:
            n = widths[axis.layer][units[axis.kind]] if axis.layer < len(widths) else 0
            kept[axis.name] = tuple(range(n or axis.size))
    return Plan(kept)


def _attention(model: PreTrainedModel) -> str:
    """The name of the attention within a layer.

    Raises ArchError if no layer has heads that could leave.
    """
    arch = arch_for(model.config)
    containers = [axis.container for axis in arch.axes(model) if axis.kind == Kind.HEAD and axis.size]
    if not containers:
        raise ArchError(f"{model.config.model_type} has no heads that could leave; there is no attention to time")
    inside = model.get_submodule(containers[0])
    names = (name for block in arch.blocks(model) for name, module in block.named_modules() if module is inside)
    return next(names)


def _buffers(source: Source, device: torch.device) -> dict[str, torch.Tensor]:
    """What the modules compute when they are built, such as the frequencies of rotary embeddings."""
    with init_empty_weights(include_buffers=False):
        built = from_config(source.config)
    return {name: buffer.to(device) for name, buffer in built.named_buffers()}
