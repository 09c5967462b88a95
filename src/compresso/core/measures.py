"""What a budget may be a share of beside counts of shapes: measured time, and bytes of weights and cache at a context.

A run that has such a budget says by which table, or at which context; every cost that is made for it answers then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.cost_table import Field
from compresso.core.latency_table import INVARIANTS, LatencyTable
from compresso.core.lookup_cost import LookupCost
from compresso.core.plan import Plan
from compresso.core.quantities import Amounts, Cost, CostName


@dataclass(frozen=True)
class Measures:
    """By what else than its shapes a model is measured.

    Args:
        latency: the table that tells milliseconds; None where nothing is timed.
        context: tokens of the cache that is counted with the weights; None where none is.
        weight_bytes, cache_bytes: of one weight as it will be stored, and of one entry of the cache.
    """

    latency: LatencyTable | None = None
    context: int | None = None
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0

    def of(self, axes: Sequence[Axis], counts: Cost, facts: Mapping[str, Field]) -> dict[CostName, Cost]:
        """What measures each quantity of a model.

        Args:
            axes, counts: of the model as it is, and what counts it.
            facts: of its shapes; those that units of heads and channels leave alone must be the table's.

        Raises:
            ValueError: the table does not hold for the model.
        """
        found: dict[CostName, Cost] = {}
        if self.latency is not None:
            self.latency.refuse_other("model", facts, [name for name in INVARIANTS if name in facts])
            found["milliseconds"] = LookupCost(axes, self.latency.costs(axes), {})
        if self.context is not None:
            found["bytes_at_context"] = BytesAtContext(counts, self.context, self.weight_bytes, self.cache_bytes)
        return found


NONE = Measures()
"""Of a run whose budgets are counts of shapes."""


class _Counted(Protocol):
    """What counts parameters and cache entries."""

    def count(self, of: CostName) -> Tensor: ...


@dataclass(frozen=True)
class _Bytes:
    """Bytes, from counts."""

    counts: _Counted
    per_weight: float
    per_entry: float

    def count(self, of: CostName) -> Tensor:
        """See `Amounts`."""
        if of != "bytes_at_context":
            return self.counts.count(of)
        return self.counts.count("total") * self.per_weight + self.counts.count("kv") * self.per_entry


@dataclass(frozen=True)
class BytesAtContext:
    """Bytes of all weights and of one sequence's key/value cache, a `Cost`.

    Args:
        counts: counts parameters and cache entries a token.
        context: tokens in the cache.
        weight_bytes, cache_bytes: of one weight, and of one entry.
    """

    counts: Cost
    context: int
    weight_bytes: float
    cache_bytes: float

    @property
    def axes(self) -> tuple[Axis, ...]:
        """See `Cost`."""
        return self.counts.axes

    def even(self, of: CostName) -> bool:
        """See `Cost`; both counts are."""
        return self.counts.even("total") and self.counts.even("kv")

    def __call__(self, masks: Mapping[str, Tensor] | None = None) -> Amounts:
        """See `Cost`."""
        return self._bytes(self.counts(masks))

    def of(self, plan: Plan) -> Amounts:
        """See `Cost`."""
        return self._bytes(self.counts.of(plan))

    def of_totals(self, names: Sequence[str], totals: Tensor) -> Amounts:
        """See `Cost`."""
        return self._bytes(self.counts.of_totals(names, totals.to(torch.float64)))

    def tiled(self, names: Sequence[str]) -> bool:
        """See `Cost`."""
        return self.counts.tiled(names)

    def _bytes(self, counted: Amounts) -> Amounts:
        return _Bytes(counted, self.weight_bytes, self.context * self.cache_bytes)
