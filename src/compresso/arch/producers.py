"""What writes the inputs of a block's linears one by one, so that a scale can move from those inputs into the linears
that read them.

A norm in front of linears is one: its weight (and bias) times 1 / s makes their inputs x / s. So is a linear whose
outputs reach them through nothing but products and weighted means: v for o, if every head has a value head of its own,
and up for down where a gate multiplies. An activation function in between forbids it.

The norm in front of a mixture of experts feeds more than one group: the first matrix of every expert, a shared expert,
and the router. Its scale has to be one for all of them; see `compresso.sweep.shared_scale`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, slots=True)
class Feeder:
    """A module whose parameters, divided by s along its outputs, divide the inputs of some linears by s.

    Args:
        module: its name, relative to the block.
        one_plus: whether its weight w multiplies by 1 + w, as Gemma's norms do.
        readers: all linears, and matrices of experts, that read what it writes, if these are several groups.
        beside: parameters [out, in] of routers that read it, too, and that no stage rounds.
        expert: the number of the expert whose rows of the up half of the module's first stack are meant; None for all
            parameters of the module.
    """

    module: str
    one_plus: bool = False
    readers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    expert: int | None = None

    def within(self, where: str) -> "Feeder":
        """The same with names that begin with that of the block."""
        readers, beside = (tuple(f"{where}.{name}" for name in names) for names in (self.readers, self.beside))
        return replace(self, module=f"{where}.{self.module}", readers=readers, beside=beside)


Producers = Mapping[tuple[str, ...], Feeder]
"""By the linears that read one input, as `Arch.linear_groups` names them; those that nothing feeds so are absent."""


def producers(
    block: nn.Module, norms: Mapping[tuple[str, ...], str], writers: Mapping[tuple[str, ...], str]
) -> Producers:
    """The producers among these modules that are there and fit.

    Args:
        block: a layer.
        norms: linears -> the norm in front of them; one that was replaced by something else is no producer.
        writers: linears -> the linear that writes their inputs; one of another width is no producer.
    """
    found: dict[tuple[str, ...], Feeder] = {}
    for names, module in norms.items():
        norm = block.get_submodule(module)
        if next(norm.parameters(), None) is not None:
            found[names] = Feeder(module, one_plus=type(norm).__name__.startswith("Gemma"))
    for names, module in writers.items():
        writer, reader = block.get_submodule(module), block.get_submodule(names[0])
        if (
            isinstance(writer, nn.Linear)
            and isinstance(reader, nn.Linear)
            and writer.out_features == reader.in_features
        ):
            found[names] = Feeder(module)
    return found
