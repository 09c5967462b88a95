"""What a run removed, layer by layer: units kept of those that were there.

Heads are key/value heads; where query heads left one by one they are query heads, of which every key/value head of a
layer keeps as many. The width of a head is that of its queries, keys and values alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from compresso.core.plan import Plan
from compresso.report.stage_facts import StageFacts

HEADS, HEAD_WIDTH, CHANNELS, HIDDEN = "heads", "width of a head", "FFN units", "hidden"
_PARTS = {"heads": HEADS, "channels": CHANNELS}
_WHOLE = {"attention": (HEADS,), "mlp": (CHANNELS,), "layers": (HEADS, CHANNELS)}
"""Axes with one unit a layer, and what is removed with it."""
_QUERIES = re.compile(r"layers\.(\d+)\.heads\.\d+\.queries")
_HEAD_CHANNELS = re.compile(r"layers\.(\d+)\.heads\.\d+\.(?:matches|values)")


@dataclass(frozen=True)
class UnitsKept:
    """Kept units of one part of one layer; the hidden dimensions are the same in all layers."""

    layer: int
    part: str
    kept: int
    of: int

    @property
    def share(self) -> float:
        """Kept share, 0..1."""
        return self.kept / self.of if self.of else 0.0


def dense_sizes(stages: Mapping[str, StageFacts]) -> dict[str, int]:
    """Axis name -> units before the first stage that touched it.

    A stage that follows the removal of whole layers numbers the remaining ones, so axes first touched there are not
    known by name.
    """
    sizes: dict[str, int] = {}
    for stage in stages.values():
        for axis, fraction in stage.units_kept.items():
            sizes.setdefault(axis, int(fraction.partition("/")[2]))
        if "layers" in stage.units_kept:
            break
    return sizes


def units_kept(plan: Plan, stages: Mapping[str, StageFacts]) -> list[UnitsKept]:
    """Every layer's parts of which the plan says something, in the numbering of the original model; parts it does not
    name are whole.
    """
    sizes = dense_sizes(stages)
    known = {axis: len(plan.kept[axis]) for axis in sizes if axis in plan.kept}
    removed = {
        (layer, part)
        for axis, parts in _WHOLE.items()
        if axis in known
        for layer in set(range(sizes[axis])) - set(plan.kept[axis])
        for part in parts
    }
    rows: dict[tuple[int, str], UnitsKept] = {}
    for axis, kept in known.items():
        prefix, _, rest = axis.partition(".")
        number, _, kind = rest.partition(".")
        if prefix == "layers" and number.isdecimal() and kind in _PARTS:
            layer, part = int(number), _PARTS[kind]
            rows[layer, part] = UnitsKept(layer, part, 0 if (layer, part) in removed else kept, sizes[axis])
    for layer, (kept, of) in _of_each(_HEAD_CHANNELS, known, sizes).items():
        rows[layer, HEAD_WIDTH] = UnitsKept(layer, HEAD_WIDTH, kept, of)
    for layer, (kept, of) in _of_each(_QUERIES, known, sizes).items():
        groups = rows.get((layer, HEADS), UnitsKept(layer, HEADS, 1, 1))
        rows[layer, HEADS] = UnitsKept(layer, HEADS, groups.kept * kept, groups.of * of)
    for layer, part in removed - rows.keys():
        rows[layer, part] = UnitsKept(layer, part, 0, 1)
    n_layers = max([sizes[axis] for axis in _WHOLE if axis in known] + [layer + 1 for layer, _ in rows], default=0)
    for axis, parts in _WHOLE.items():  # where only whole sub-layers could be removed, the others are whole
        for layer in range(sizes[axis]) if axis in known else ():
            for part in parts:
                rows.setdefault((layer, part), UnitsKept(layer, part, 1, 1))
    if "hidden" in known:
        rows |= {
            (layer, HIDDEN): UnitsKept(layer, HIDDEN, known["hidden"], sizes["hidden"]) for layer in range(n_layers)
        }
    return [rows[key] for key in sorted(rows)]


def _of_each(names: re.Pattern[str], known: Mapping[str, int], sizes: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Layer -> query heads, or channels, that each of its heads keeps, and has had, where they left one by one."""
    return {int(match[1]): (n, sizes[name]) for name, n in known.items() if (match := names.fullmatch(name))}
