"""Depth as levels: each attention, MLP or layer is an item that stays (0) or goes (1)."""

import math
from collections.abc import Sequence

from compresso.core.axis import Axis, Kind
from compresso.core.quantities import Cost, CostName
from compresso.solve.depth import Part, parts_of, without
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Item, Levels
from compresso.solve.level_costs import priced


def depth_parts(axes: Sequence[Axis]) -> list[Part]:
    """The parts that are there, block after block."""
    return sorted(parts_of(axes), key=lambda part: (part[1], part[0]))


def depth_items(axes: Sequence[Axis], parts: Sequence[Part], cost: Cost, of: CostName) -> list[Item]:
    """An item for each part, whose levels cost 0, and what the model costs less without it."""
    return [priced(f"{name}.{unit}", [{}, without(axes, [(name, unit)]).masks(axes)], cost, of) for name, unit in parts]


def sub_layers_of(axes: Sequence[Axis], parts: Sequence[Part]) -> list[tuple[int, tuple[Kind, ...]]]:
    """The block of each part, and the kinds of sub-layers that leave with it. axes: all of the model."""
    kinds = {axis.name: axis.kind for axis in axes}
    halves = [axis for axis in axes if axis.kind in (Kind.ATTENTION, Kind.MLP)]
    there = {unit: tuple(kinds[name] for name, here in parts_of(halves) if here == unit) for _, unit in parts}
    return [(unit, there[unit] if kinds[name] == Kind.LAYER else (kinds[name],)) for name, unit in parts]


def gone(parts: Sequence[Part], levels: Levels) -> list[Part]:
    """The parts that a candidate is without."""
    return [part for part, level in zip(parts, levels, strict=True) if level]


def pairs(parts: Sequence[Part]) -> list[tuple[int, ...]]:
    """Places of a block's attention and MLP, of the blocks that have both."""
    places: dict[int, list[int]] = {}
    for place, (_, unit) in enumerate(parts):
        places.setdefault(unit, []).append(place)
    return [tuple(both) for both in places.values() if len(both) > 1]


def keeping_fewest(fitness: Fitness, axes: Sequence[Axis], parts: Sequence[Part]) -> Fitness:
    """The fitness, infinite for candidates that keep fewer parts of an axis than have to stay; the model is not asked
    about these.
    """
    fewest = {axis.name: axis.fewest for axis in axes}

    def held(levels: Levels, stage: int, /) -> float:
        kept = [name for (name, _), level in zip(parts, levels, strict=True) if not level]
        if any(kept.count(name) < n for name, n in fewest.items()):
            return math.inf
        return fitness(levels, stage)

    return held


def as_layers(axes: Sequence[Axis], parts: Sequence[Part], removed: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """The layers that lose all their parts, and the other removed parts in the numbering of the layers that stay.

    Args:
        axes: all of the model; without a layer axis every part is one of the others.
        parts: that are there, of attentions and MLPs both, or of one axis alone.
        removed: of these.
    """
    layers = next((axis for axis in axes if axis.kind == Kind.LAYER), None)
    if layers is None or len({name for name, _ in parts}) < 2:
        return [], list(removed)
    left = {unit for name, unit in parts if (name, unit) not in set(removed)}
    empty = sorted({unit for _, unit in removed} - left)[: layers.size - layers.fewest]
    place = {unit: i for i, unit in enumerate(unit for unit in range(layers.size) if unit not in empty)}
    return [(layers.name, unit) for unit in empty], [(name, place[unit]) for name, unit in removed if unit in place]
