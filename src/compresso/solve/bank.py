"""A bank of nested choices: of each sub-layer, the order in which its units leave, and what each level of it costs.

Plain values, made once for a model and a calibration by `compresso.sweep.bank`; whoever searches for shapes picks one
level of each sub-layer, and `plan` and `weights_at` say what that leaves of the model. Orders are nested, so that a
level is a number and not a set of units, and weights need not be kept: they are the least squares fit on what stays,
for any second moment of what the linear reads.

A sub-layer is an attention or an FFN, seen through the one linear that reads all its units and writes to the stream
(`o_proj`, `down_proj`). Attentions whose query heads share key/value heads have levels in two directions: so many
query heads left in every key/value head (a ladder each), and so many key/value heads left.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.obs_groups import damped, refit
from compresso.core.plan import Plan
from compresso.errors import NumericError

GRID = 16
"""FFN channels between two levels."""


@dataclass(frozen=True)
class Ladder:
    """Units of one sub-layer in the order in which they leave.

    Args:
        slots: query heads that every key/value head has left here; 1 for channels.
        order: units, the first to leave first.
        errors: before any left, after the first, ... [units + 1], ascending; see `SubLayer`.
    """

    slots: int
    order: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class SubLayer:
    """An attention or an FFN.

    Errors are mean squared changes of what it writes to the stream, over the calibration's tokens, weighted and damped
    as the bank's identity says.

    Args:
        layer: its layer.
        kind: ATTENTION or MLP.
        consumer: the linear that reads its units, by full name.
        units: the axis of its units; None where they all stay, and only the whole can leave.
        width: inputs of the consumer that belong to one unit.
        slots: query heads of a whole key/value head; 1 for channels.
        fewest: units that must stay while the sub-layer does.
        ladders: by query heads left, most first; empty where all units stay.
        queries: of each key/value head, the query heads that leave, in that order; empty where they share none.
        gone: the error once the sub-layer is gone, its bias too.
        damping: share of the mean diagonal that was added to the second moment.
    """

    layer: int
    kind: Kind
    consumer: str
    units: str | None
    width: int
    slots: int
    fewest: int
    ladders: tuple[Ladder, ...]
    queries: tuple[tuple[int, ...], ...]
    gone: float
    damping: float

    @property
    def name(self) -> str:
        """Unique in a model, such as `layers.3.attention`."""
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class Level:
    """What stays of a sub-layer.

    Args:
        units: how many, all of them at the dense level; 0 once it is gone.
        slots: query heads of each that stay; 1 for channels, 0 once it is gone.
        error: see `SubLayer`.
        relative: root of the error as a share of that of the sub-layer gone.
    """

    units: int
    slots: int
    error: float
    relative: float

    @property
    def gone(self) -> bool:
        """Whether the sub-layer is."""
        return not self.units


@dataclass(frozen=True)
class Bank:
    """All sub-layers of a model.

    Args:
        identity: what it was made of: model, calibration, knobs, dtype; JSON values.
        layers: how many the model has.
        sub_layers: by name, in the order of computation.
        blocks: by layer, the error once the whole block is gone; empty where no block can leave.
    """

    identity: Mapping[str, Any]
    layers: int
    sub_layers: Mapping[str, SubLayer]
    blocks: Mapping[int, float]


def levels(sub_layer: SubLayer, grid: int = GRID) -> tuple[Level, ...]:
    """The levels of a sub-layer: dense first, gone last; key/value heads in steps of one, channels in multiples of
    `grid`.
    """
    found: list[Level] = []
    for ladder in sub_layer.ladders:
        size = len(ladder.order)
        step = grid if sub_layer.kind == Kind.MLP else 1
        kept = [size, *(n for n in range((size - 1) // step * step, 0, -step) if n >= sub_layer.fewest)]
        found += [_level(sub_layer, n, ladder.slots, ladder.errors[size - n]) for n in kept]
    if not found:
        found.append(Level(1, 1, 0.0, 0.0))
    return (*found, _level(sub_layer, 0, 0, sub_layer.gone))


def _level(sub_layer: SubLayer, units: int, slots: int, error: float) -> Level:
    return Level(units, slots, error, (error / sub_layer.gone) ** 0.5 if sub_layer.gone > 0 else 0.0)


def kept(sub_layer: SubLayer, level: Level) -> dict[str, tuple[int, ...]]:
    """What stays of the sub-layer's axes: their names and units, ascending. Empty at a level that is gone, which the
    axis of sub-layers says, and where all stays.
    """
    ladder = _ladder(sub_layer, level)
    if ladder is None or sub_layer.units is None:
        return {}
    units = sorted(ladder.order[len(ladder.order) - level.units :])
    axes = {sub_layer.units: tuple(units)} if len(units) < len(ladder.order) else {}
    if level.slots < sub_layer.slots:
        axes |= {
            f"{sub_layer.units}.{unit}.queries": _slots(sub_layer, unit, level.slots)
            for unit in range(len(ladder.order))
            if unit in units
        }
    return axes


def columns(sub_layer: SubLayer, level: Level) -> Tensor:
    """Inputs of the consumer that stay, ascending, int64."""
    ladder = _ladder(sub_layer, level)
    if ladder is None:
        return torch.arange(sub_layer.width if level.units and not sub_layer.ladders else 0)
    slot = sub_layer.width // sub_layer.slots
    units = sorted(ladder.order[len(ladder.order) - level.units :])
    starts = [unit * sub_layer.width + one * slot for unit in units for one in _slots(sub_layer, unit, level.slots)]
    return (torch.tensor(starts).unsqueeze(1) + torch.arange(slot)).flatten()


def weights_at(sub_layer: SubLayer, level: Level, weight: Tensor, moment: Tensor, damping: float = 0.01) -> Tensor:
    """The consumer's weights at a level, fitted so that its outputs change least.

    Args:
        sub_layer: whose consumer.
        level: one of `levels`.
        weight: dense, [out, in].
        moment: second moment of what the consumer reads [in, in], of any scale: that of the dense stream, or of an
            edited one.
        damping: share of the mean diagonal added to it, which holds weights to the old ones. On SmolLM2-135M with 11
            tokens a column, the outputs of single linears on other text were closest at 0.3; WikiText-2 perplexity was
            73.3 there and 74.5 at 0.01 with a quarter of all channels gone, but 158 and 147 with half of them. Choose
            on other text where it matters.

    Returns:
        [out, in] of the weight's dtype, 0 at what leaves; the weight itself, bit for bit, where nothing does.

    Raises:
        NumericError: the moment cannot be inverted.
    """
    stay = columns(sub_layer, level).to(weight.device)
    if len(stay) == weight.shape[1]:
        return weight.clone()
    found = torch.zeros_like(weight)
    if len(stay):
        try:
            found[:, stay] = refit(weight, damped(moment, damping)[0], stay).to(weight.dtype)
        except NotPositiveDefiniteError as error:
            raise NumericError(
                f"{sub_layer.consumer}: {error}; give more calibration examples, or raise damping"
            ) from error
    return found


def plan(bank: Bank, chosen: Mapping[str, Level], without: Collection[int] = ()) -> Plan:
    """What stays of a model.

    Args:
        bank: of the model.
        chosen: the level of sub-layers by name; those that are not named stay as they are.
        without: layers that leave whole, whatever was chosen of them.

    Raises:
        KeyError: a name that the bank does not have, or a layer that cannot leave.
    """
    axes: dict[str, tuple[int, ...]] = {}
    gone: dict[Kind, set[int]] = {Kind.ATTENTION: set(), Kind.MLP: set(), Kind.LAYER: set(without)}
    for layer in without:
        bank.blocks[layer]
    for name, level in chosen.items():
        sub_layer = bank.sub_layers[name]
        if sub_layer.layer in gone[Kind.LAYER]:
            continue
        if level.gone:
            gone[sub_layer.kind].add(sub_layer.layer)
        axes |= kept(sub_layer, level)
    names = {Kind.ATTENTION: "attention", Kind.MLP: "mlp", Kind.LAYER: "layers"}
    return Plan(
        axes
        | {names[one]: tuple(i for i in range(bank.layers) if i not in leave) for one, leave in gone.items() if leave}
    )


def _ladder(sub_layer: SubLayer, level: Level) -> Ladder | None:
    """The ladder that a level stands on; None of a sub-layer that is gone or has none."""
    return next((one for one in sub_layer.ladders if one.slots == level.slots), None)


def _slots(sub_layer: SubLayer, unit: int, left: int) -> tuple[int, ...]:
    """The query heads of a unit that stay, ascending."""
    leaving = sub_layer.queries[unit][: sub_layer.slots - left] if sub_layer.queries else ()
    return tuple(i for i in range(sub_layer.slots) if i not in leaving)
