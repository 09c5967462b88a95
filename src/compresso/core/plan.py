"""A structural decision: which units of which axes are kept. Every method's outcome that changes shapes is a Plan."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from compresso.core import strict_json
from compresso.core.axis import Axis

_LAYER_PREFIX = re.compile(r"^layers\.(\d+)\.")
_WITHIN = re.compile(r"^(layers\.\d+\.heads)\.(\d+)(\..+)$")
_ONE_UNIT_A_LAYER = ("attention", "mlp")


@dataclass(frozen=True)
class Plan:
    """Kept unit indices per axis name, ascending; an axis that is absent keeps all its units.

    Whole layers are the axis `layers`; axes of one layer are named `layers.{i}.…`, those within a key/value head
    `layers.{i}.heads.{g}.…`. Indices and names refer to the model before removal.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    @staticmethod
    def from_masks(axes: Iterable[Axis], masks: Mapping[str, Tensor]) -> "Plan":
        """The plan that keeps units whose mask value is above zero; it does not name axes within units that leave.

        masks: axis name -> [size].
        """
        kept: dict[str, tuple[int, ...]] = {}
        for axis in axes:
            if axis.name in masks:
                alive: list[bool] = (masks[axis.name].detach() > 0).tolist()  # pyright: ignore
                kept[axis.name] = tuple(i for i, keep in enumerate(alive) if keep)
        return Plan(_of_units_that_stay(kept))

    def masks(
        self, axes: Iterable[Axis], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """0/1 masks [size] for every axis that the plan names."""
        result: dict[str, Tensor] = {}
        for axis in axes:
            if axis.name in self.kept:
                mask = torch.zeros(axis.size, dtype=dtype, device=device)
                mask[list(self.kept[axis.name])] = 1
                result[axis.name] = mask
        return result

    def check(self, axes: Iterable[Axis]) -> None:
        """Raise ValueError if an index is out of range, repeated or unordered, an axis unknown, `min_units` is
        undercut, the groups of an axis would keep unequal numbers, or units that stay would of those within them.
        """
        by_name = {axis.name: axis for axis in axes}
        for name, kept in self.kept.items():
            if name not in by_name:
                raise ValueError(
                    f"plan names axis '{name}', which the model does not have; its axes start with"
                    f" {sorted(by_name)[:3]}"
                )
            axis = by_name[name]
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < axis.size):
                raise ValueError(
                    f"plan for '{name}' must list ascending unit indices in [0, {axis.size}), got {list(kept)[:8]}"
                )
            if len(kept) < axis.fewest:
                raise ValueError(
                    f"plan leaves {name} with {len(kept)} of {axis.size} units; at least {axis.fewest} must be kept"
                )
            each = axis.size // axis.groups
            left = [sum(unit // each == group for unit in kept) for group in range(axis.groups)]
            if len(set(left)) > 1:
                raise ValueError(
                    f"plan keeps {left} units in the {axis.groups} groups of {name}, which its router compares; keep as"
                    " many in each"
                )
        counts: dict[str, dict[int, str]] = {}
        for axis in by_name.values():
            if axis.within is not None and axis.within[1] in self.kept.get(axis.within[0], (axis.within[1],)):
                number = len(self.kept.get(axis.name, range(axis.size)))
                counts.setdefault(axis.within[0], {}).setdefault(number, axis.name)
        for name, found in counts.items():
            if len(found) > 1:
                told = ", ".join(f"{number} in {inner}" for number, inner in found.items())
                raise ValueError(
                    f"plan keeps unequal numbers within the units of {name} ({told}); keep as many in each"
                )

    def is_noop(self, axes: Iterable[Axis]) -> bool:
        """Whether every unit of every axis is kept."""
        return all(axis.name not in self.kept or len(self.kept[axis.name]) == axis.size for axis in axes)

    def then(self, later: "Plan") -> "Plan":
        """One plan for the original model equal to this plan followed by `later`, whose indices refer to the already
        smaller model.

        A smaller model numbers the remaining units from 0: those that this plan keeps and, for the axes `attention`
        and `mlp`, whose units lie one in each layer, only those in layers that this plan keeps. Axes within units that
        leave are not named.
        """
        combined = dict(self.kept)
        layers = self.kept.get("layers")
        for name, kept in later.kept.items():
            original = self.original_name(name)
            before = self.kept.get(original)
            if name in _ONE_UNIT_A_LAYER:  # units keep the numbers of their layers, also removed ones
                mapped = kept if layers is None else tuple(layers[i] for i in kept)
                combined[original] = tuple(i for i in mapped if before is None or i in before)
            else:
                combined[original] = tuple(kept) if before is None else tuple(before[i] for i in kept)
        return Plan(_of_units_that_stay(combined))

    def original_name(self, name: str) -> str:
        """The name an axis had before this plan removed whole layers, or key/value heads, and renumbered the rest."""
        match = _LAYER_PREFIX.match(name)
        if match is not None and "layers" in self.kept:
            name = f"layers.{self.kept['layers'][int(match[1])]}." + name[match.end() :]
        within = _WITHIN.match(name)
        if within is not None and within[1] in self.kept:
            name = f"{within[1]}.{self.kept[within[1]][int(within[2])]}{within[3]}"
        return name

    def to_json(self) -> str:
        """Indented JSON: {"format": 1, "kept": {axis: [indices]}}."""
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(list(kept))}" for name, kept in self.kept.items())
        return '{\n  "format": 1,\n  "kept": {\n' + rows + "\n  }\n}\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Inverse of `to_json`.

        Raises:
            ValueError: another format, or anything but lists of indices.
        """
        data: Any = strict_json.loads(text)
        rows: Any = data.get("kept") if isinstance(data, dict) and data.get("format") == 1 else None  # pyright: ignore
        if not isinstance(rows, dict):
            raise ValueError('not a plan: wanted an object with "format": 1 and "kept"')
        plan = cast(dict[str, Any], rows)
        for name, kept in plan.items():
            units = cast(list[Any], kept) if isinstance(kept, list) else [None]
            if not all(type(i) is int and i >= 0 for i in units):
                raise ValueError(f"not a plan: {name[:80]!r} keeps {str(units)[:40]}; wanted a list of unit indices")
        return Plan({name: tuple(cast(list[int], kept)) for name, kept in plan.items()})


def _of_units_that_stay(kept: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What is kept, without axes within units that are not."""
    found = dict(kept)
    for name in kept:
        within = _WITHIN.match(name)
        if within is not None and within[1] in kept and int(within[2]) not in kept[within[1]]:
            del found[name]
    return found
