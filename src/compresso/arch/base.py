"""What an architecture provides to the rest of the program, and how one is found for a config.

An architecture is described once, in a file of its own beside this one; masking, counting, shrinking and exporting
follow from the description. Files of this package are found by walking it, so a new file is a new architecture. One
that cannot be imported is an error.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.producers import Producers
from compresso.core.axis import Axis, Kind
from compresso.core.cost import Weight
from compresso.errors import ArchError


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The widths of one decoder layer; 0 heads or 0 channels mean that the sub-layer (with its norm) is not there.

    Args:
        query_heads: attention heads.
        kv_heads: key/value heads, a divisor of `query_heads`.
        channels: FFN intermediate units; of one expert, in a layer that has experts.
        experts: routed experts; 0 in a layer with one FFN.
    """

    query_heads: int
    kv_heads: int
    channels: int
    experts: int = 0


class Arch(Protocol):
    """One architecture. Every method reads shapes off the modules, so all of them hold on the meta device and for
    shrunk models.
    """

    @property
    def name(self) -> str:
        """The `model_type` it describes."""
        ...

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether a model with this config is described here."""
        ...

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """Everything that can still be removed.

        Raises:
            ArchError: the modules are not what the config says.
        """
        ...

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, tied ones once, as `CostModel` counts it."""
        ...

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers, in order."""
        ...

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Names, relative to the block, of the linears that share one input, in the order of computation."""
        ...

    def producers(self, block: nn.Module) -> Producers:
        """What writes the inputs of these groups, so that a scale can move between the two."""
        ...

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each decoder layer."""
        ...

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Replace a block's attention (Kind.ATTENTION) or FFN (Kind.MLP) and its norm by modules without parameters
        that add nothing.
        """
        ...

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Make the config and the modules' own shape fields agree with the parameters."""
        ...


_described: list[Arch] = []


def register(arch: Arch) -> Arch:
    """Add a description; the last one that matches a config wins, so a user's own takes precedence."""
    _described.append(arch)
    return arch


def arch_for(config: PreTrainedConfig) -> Arch:
    """The description that matches a config.

    Raises:
        ArchError: there is none.
    """
    import compresso.arch as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for arch in reversed(_described):
        if arch.matches(config):
            return arch
    known = ", ".join(sorted({arch.name for arch in _described}))
    raise ArchError(
        f"no architecture describes model_type '{config.model_type}'; described are {known}. "
        "Use one of these, or describe it and call compresso.arch.base.register"
    )
