"""The channels of each attention head as units of their own, in encoders whose stock class takes narrower heads.

As query heads (`queries.py`), they are not among the axes of an `Arch`, and follow from its axes of heads where they
are asked for. A head has two kinds of channel, which leave for reasons of their own:

    layers.3.heads.1.matches   unit c: row c of the head's queries and of its keys, one product of every score
    layers.3.heads.1.values    unit c: row c of its values and the column of the output projection that reads it

A config says one width for all of them, so that all heads keep as many of both. Scores are divided by the root of that
width, which a smaller model has less of: removal multiplies queries by sqrt(kept / size) instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.parts import Parts
from compresso.core.axis import Axis, Gate, Kind

MATCHES, VALUES = "matches", "values"
HEAD_CHANNELS = (f".{MATCHES}", f".{VALUES}")
"""What their names end with."""


@runtime_checkable
class NarrowsHeads(Protocol):
    """An architecture whose heads can get narrower; an `Arch` may be one."""

    def with_head_channels(self, model: PreTrainedModel, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        """These axes of a model, and those of the channels of its heads, where it is built with narrower ones."""
        ...

    def narrow_heads_(self, block: nn.Module, width: int) -> None:
        """Tell a layer, whose tensors are cut, how wide its heads are."""
        ...


def with_head_channels(axes: Sequence[Axis], where: str, parts: Parts) -> tuple[Axis, ...]:
    """The same axes, and behind each axis of heads those of the channels of its heads.

    Args:
        axes: of a model whose heads have keys and values of their own, in linears apart.
        where: qualified name of its list of layers.
        parts: the names of a layer's parts.
    """
    found: list[Axis] = []
    for axis in axes:
        found.append(axis)
        if axis.kind == Kind.HEAD and axis.layer is not None:
            block = f"{where}.{axis.layer}"
            found += [one for unit in range(axis.size) for one in _of_head(axis, unit, block, parts)]
    return tuple(found)


def narrow_heads_(block: nn.Module, parts: Parts, width: int) -> None:
    """Tell a layer's attention, whose tensors are cut, how wide its heads are; it divides scores by the root of it."""
    core = block.get_submodule(parts.core)
    setattr(core, parts.head_dim, width)
    if hasattr(core, "scaling"):
        core.scaling = width**-0.5  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def _of_head(heads: Axis, unit: int, block: str, parts: Parts) -> tuple[Axis, Axis]:
    """The two axes of one head."""
    (reads,) = heads.gates
    width = reads.width
    query, key, value = (f"{block}.{name}" for name in parts.read)
    write = f"{block}.{parts.write}"
    slices = {
        module: tuple(
            replace(piece, width=1, start=piece.start + unit * width)
            for piece in heads.slices
            if piece.param.rpartition(".")[0] == module
        )
        for module in (query, key, value, write)
    }
    place: dict[str, Any] = {"start": unit * width, "of": heads.size * width}
    shared: dict[str, Any] = {
        "kind": Kind.HEAD_CHANNEL,
        "size": width,
        "container": heads.container,
        "layer": heads.layer,
        "min_units": 1,
        "within": (heads.name, unit),
    }
    return (
        Axis(
            name=f"{heads.name}.{unit}.{MATCHES}",
            slices=(*slices[query], *slices[key]),
            gates=(Gate(query, "output", **place),),
            rooted=slices[query],
            **shared,
        ),
        Axis(
            name=f"{heads.name}.{unit}.{VALUES}",
            slices=(*slices[value], *slices[write]),
            gates=(Gate(write, "input", **place),),
            **shared,
        ),
    )
