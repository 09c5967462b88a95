"""Query heads as units of their own, in models whose query heads share key/value heads.

The axes of an `Arch` have no such units: a plan, a budget or a table that does not ask for them sees the same model as
ever. Where they are asked for, they follow from what is there. Whatever holds a key/value head with its query heads
holds, of each of these, the same number of entries as the input of `o`; keys and values are narrower.

    layers.3.heads              unit g: key/value head g with its query heads
    layers.3.heads.1.queries    unit r: the r-th query head of key/value head 1

A layer's key/value heads keep as many query heads each, so that what stays is grouped-query attention with another
ratio. At least one stays; the last ones leave with their key/value head.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from compresso.arch.base import Arch, LayerShape
from compresso.arch.head_channels import NarrowsHeads
from compresso.core.axis import Axis, Kind

WITHIN = (Kind.QUERY, Kind.HEAD_CHANNEL)
"""Kinds of units that lie within others, and are there only where they are asked for."""


def axes_of(arch: Arch, model: PreTrainedModel, kinds: Collection[Kind]) -> tuple[Axis, ...]:
    """The axes of a model, with those of its query heads and of the channels of its heads if `kinds` holds them.

    Raises:
        ArchError: the modules are not what the config says.
    """
    axes = arch.axes(model)
    if Kind.HEAD_CHANNEL in kinds and isinstance(arch, NarrowsHeads):
        axes = arch.with_head_channels(model, axes)
    return with_queries(axes, arch.shapes(model)) if Kind.QUERY in kinds else axes


def with_queries(axes: Sequence[Axis], shapes: Sequence[LayerShape]) -> tuple[Axis, ...]:
    """The same axes, and behind each axis of key/value heads that query heads share those of the query heads.

    shapes: of the model's layers.
    """
    found: list[Axis] = []
    for axis in axes:
        found.append(axis)
        if axis.kind == Kind.HEAD and axis.layer is not None:
            shape = shapes[axis.layer]
            slots = shape.query_heads // shape.kv_heads if shape.kv_heads else 1
            if slots > 1:
                found += [_queries(axis, unit, slots) for unit in range(axis.size)]
    return tuple(found)


def _queries(heads: Axis, unit: int, slots: int) -> Axis:
    """The query heads of one key/value head."""
    group = heads.gates[0].width  # entries of a key/value head's queries
    width = group // slots
    return Axis(
        name=f"{heads.name}.{unit}.queries",
        kind=Kind.QUERY,
        size=slots,
        slices=tuple(
            replace(piece, width=width, start=piece.start + unit * group)
            for piece in heads.slices
            if piece.width == group
        ),
        gates=tuple(replace(gate, width=width, start=unit * group, of=heads.size * group) for gate in heads.gates),
        container=heads.container,
        layer=heads.layer,
        min_units=1,
        within=(heads.name, unit),
    )
