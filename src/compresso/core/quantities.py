"""What a budget may be a share of, and what measures it: by a formula over parameters, or looked up in a table.

A cost is called with masks or keep probabilities and answers with amounts; what allocates to a budget sees no more of
it than that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.plan import Plan

Counted = Literal["blocks", "total", "macs", "kv"]
"""What follows from the shapes of a model alone."""
CostName = Literal["blocks", "total", "macs", "kv", "bytes", "bytes_at_context", "milliseconds"]
"""What a budget may be a share of."""
Budgeted = Literal["blocks", "total", "macs", "kv", "bytes_at_context", "milliseconds"]
"""What the budget of a stage may be a share of; the last two where the run says by which context or table."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One thing that costs are measured in.

    Args:
        words: what it is called in messages.
        whole: whether it comes in whole numbers.
    """

    words: str
    whole: bool = True

    def settled(self, amount: float) -> float:
        """An amount without the rounding error of fractional masks, whose n / size * size is not always n."""
        return round(amount, 2) if self.whole else float(f"{amount:.12g}")

    def text(self, amount: float) -> str:
        """An amount as it stands in messages.

        >>> Quantity("parameters").text(1234.0), Quantity("milliseconds", whole=False).text(0.01234567)
        ('1,234', '0.01235')
        """
        return f"{int(amount):,}" if self.whole else f"{amount:,.4g}"


QUANTITIES: Mapping[CostName, Quantity] = {
    "blocks": Quantity("block parameters"),
    "total": Quantity("parameters"),
    "macs": Quantity("multiply-accumulates a token"),
    "kv": Quantity("key/value cache entries a token"),
    "bytes": Quantity("bytes of weights"),
    "bytes_at_context": Quantity("bytes of weights and cache"),
    "milliseconds": Quantity("milliseconds", whole=False),
}


class Amounts(Protocol):
    """What a model costs, under some masks."""

    def count(self, of: CostName) -> Tensor:
        """The amount of one quantity, a float64 scalar [] with gradients where the masks have them. Raises ValueError
        for a quantity that is not measured.
        """
        ...


class Cost(Protocol):
    """Measures a model under any masks; what budgets are counted with.

    An amount must never grow when units leave.
    """

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the model."""
        ...

    def even(self, of: CostName) -> bool:
        """Whether a unit of an axis costs the same however many of that axis stay, the others being whole."""
        ...

    def __call__(self, masks: Mapping[str, Tensor] | None = None) -> Amounts:
        """Measure under masks or keep probabilities: axis name -> [size], values in [0, 1]; an absent axis keeps all
        its units.
        """
        ...

    def of(self, plan: Plan) -> Amounts:
        """Measure the model that a plan leaves."""
        ...

    def of_totals(self, names: Sequence[str], totals: Tensor) -> Amounts:
        """Measure from how many units of each axis are expected to stay [axes], float64; other axes keep all."""
        ...

    def tiled(self, names: Sequence[str]) -> bool:
        """Whether totals alone decide what these axes cost."""
        ...
