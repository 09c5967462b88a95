"""What the modules of a model were measured to cost with each number of their units, written to and read from JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from compresso.core import strict_json
from compresso.core.quantities import QUANTITIES, CostName

Field = str | int | float | bool
"""A value that says which model, or which circumstances, a table holds for."""


@dataclass(frozen=True)
class CostTable:
    """What the modules of one model were measured to cost.

    Args:
        model: what the numbers hold for: sizes of the model, device, dtype, batch and whatever else they depend on.
        modules: axis name -> units kept -> cost; the largest number of units is all of them. Numbers between are
            interpolated, those below the least one cost what it costs.
        fixed: cost of everything else.
        of: what is measured.

    Raises:
        ValueError: a cost is negative or not finite, a module has none, or `of` is unknown.
    """

    model: Mapping[str, Field]
    modules: Mapping[str, Mapping[int, float]]
    fixed: float = 0.0
    of: CostName = "milliseconds"

    def __post_init__(self) -> None:
        """Check all values."""
        if self.of not in QUANTITIES:
            raise ValueError(f"a table of '{self.of}' is unknown; give one of {', '.join(QUANTITIES)}")
        for name, costs in self.modules.items():
            if not costs or min(costs) < 0:
                raise ValueError(f"{name} has no cost at any number of units from 0 up; measure it with all its units")
        every = [("the fixed part", self.fixed)]
        every += [(f"{name} with {n} units", cost) for name, costs in self.modules.items() for n, cost in costs.items()]
        for what, cost in every:
            if not (math.isfinite(cost) and cost >= 0):
                raise ValueError(f"{what} costs {cost}; wanted a finite number from 0 up: measure it again")

    def to_json(self) -> str:
        """As JSON text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read what `to_json` wrote.

        Raises:
            ValueError: for anything else.
        """
        try:
            told = strict_json.loads(text)
            modules = {
                name: {int(n): float(cost) for n, cost in costs.items()} for name, costs in told["modules"].items()
            }
            return cls(dict(told["model"]), modules, float(told["fixed"]), told["of"])
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a cost table ({error!r}); wanted model, modules, fixed and of") from error


def monotone(values: Sequence[float]) -> list[float]:
    """The nondecreasing values nearest to some, in least squares (pooled neighbours).

    >>> monotone([1.0, 3.0, 2.0, 5.0])
    [1.0, 2.5, 2.5, 5.0]
    """
    pools: list[tuple[float, int]] = []  # mean and length
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (right, n), (left, m) = pools.pop(), pools.pop()
            pools.append(((left * m + right * n) / (m + n), m + n))
    return [mean for mean, length in pools for _ in range(length)]


def every_count(costs: Mapping[int, float], longest: int) -> list[float]:
    """The cost at 0, 1, ... `longest` units; beyond all of them what all cost."""
    counts = sorted(costs)
    known = dict(zip(counts, monotone([costs[n] for n in counts]), strict=True))
    found = [known[counts[0]]] * (counts[0] + 1)
    for fewer, more in pairwise(counts):
        share = [(n - fewer) / (more - fewer) for n in range(fewer + 1, more + 1)]
        found += [known[fewer] * (1 - part) + known[more] * part for part in share]
    return found + [found[-1]] * (longest + 1 - len(found))
