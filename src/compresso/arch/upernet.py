"""UperNet (arXiv 1807.10221) over a backbone of transformers, such as Swin V2 (arXiv 2111.09883): what teaches a
segmenter in the code of arXiv 2309.02617.

It is counted, trained and asked, and loses nothing: no axis is described. Multiply-accumulates are those of one picture
of the backbone's `image_size`, every convolution and linear, as seen in a forward pass without numbers.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.base import LayerShape, register
from compresso.arch.outputs import any_input
from compresso.arch.producers import Producers
from compresso.core.axis import Axis, Kind
from compresso.core.cost import Group, Weight
from compresso.errors import ArchError


@dataclass(frozen=True, slots=True)
class UperNet:
    """An `Arch` for UperNet."""

    name: str = "upernet"

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type."""
        return config.model_type == self.name

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """None."""
        return ()

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, with the places of one picture at which it multiplies."""
        places, weights = _places(model), list[Weight]()
        for name, parameter in model.named_parameters():
            module, _, tensor = name.rpartition(".")
            norm = isinstance(model.get_submodule(module), nn.BatchNorm2d | nn.LayerNorm)
            group = Group.NORMS if norm else Group.BLOCKS if name.startswith("backbone.encoder.") else Group.EMBEDDINGS
            macs = places.get(module, 0) if tensor == "weight" and not norm else 0
            weights.append(Weight(name, tuple(parameter.shape), group, macs=macs))
        return tuple(weights)

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The backbone's stages, in order. Raises ArchError for a backbone that has no list of them."""
        for name in ("backbone.encoder.layers", "backbone.encoder.stages"):
            try:
                stages = model.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(stages, nn.ModuleList):
                return stages
        kind = model.config.backbone_config.model_type  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        raise ArchError(f"a {kind} under UperNet has no list of stages; give Swin, Swin V2 or ConvNeXt")

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """None: no sweep goes through it."""
        return ()

    def producers(self, block: nn.Module) -> Producers:
        """None."""
        return {}

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """None: its stages are no decoder layers."""
        return []

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Nothing leaves. Raises ArchError."""
        raise ArchError(f"no {kind} of a stage under UperNet can be left out")

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Nothing changes shape."""


def _places(model: PreTrainedModel) -> dict[str, int]:
    """How many places of one picture each convolution and linear writes, all of its calls together."""
    with torch.device("meta"):
        shaped: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config)).eval()
        picture = any_input(model.config).to("meta")
    found: dict[str, int] = {}

    def count(name: str, module: nn.Module) -> None:
        def see(_: nn.Module, __: object, output: Tensor) -> None:
            wide = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            found[name] = found.get(name, 0) + output.numel() // int(wide)

        module.register_forward_hook(see)

    for name, module in shaped.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            count(name, module)
    with torch.no_grad():
        shaped(pixel_values=picture)
    return found


UPERNET = register(UperNet())
