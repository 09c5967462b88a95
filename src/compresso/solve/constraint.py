"""Budgets that learned gates are held to: one for the whole model (Compresso), or one per kind and layer
(LLM-Shearing).

Both say how far the expected counts are from where they should be (for a Lagrangian), and which shift of log-alpha
would put them there (for a projection). `progress` in [0, 1] is the share of the way from the dense model to the final
target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresso.core import hard_concrete
from compresso.core.axis import Axis, Kind
from compresso.core.gates import Gates
from compresso.core.quantities import Cost, CostName
from compresso.solve.project import reachable, shift_to_budget


@dataclass(frozen=True)
class ShareOfModel:
    """Keep a share of one count of the whole model (Compresso, arXiv 2310.05015, equation of the expected sparsity).

    Args:
        cost: counts the model.
        keep: share of the dense count that is kept in the end, in (0, 1].
        of: "blocks", "total" or "macs".
    """

    cost: Cost
    keep: float
    of: CostName = "blocks"
    _reach: dict[tuple[str, ...], tuple[float, float]] = field(
        default_factory=dict[tuple[str, ...], tuple[float, float]], repr=False
    )

    @property
    def n_terms(self) -> int:
        """One pair of multipliers."""
        return 1

    def sparsity(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """1 - expected count / dense count, float64 []."""
        names = tuple(probabilities)
        if names and self.cost.tiled(names):  # one sum over all gates in place of one an axis
            sizes = [len(one) for one in probabilities.values()]
            flat = torch.cat(tuple(probabilities.values())).double()
            totals = torch.segment_reduce(flat, "sum", lengths=torch.tensor(sizes, device=flat.device), unsafe=True)
            counted = self.cost.of_totals(names, totals)
        else:
            counted = self.cost(probabilities)
        return 1 - counted.count(self.of) / float(self.cost().count(self.of))

    def target(self, progress: float) -> float:
        """The sparsity wanted now."""
        return (1 - self.keep) * progress

    def gaps(self, probabilities: Mapping[str, Tensor], progress: float) -> list[Tensor]:
        """Expected minus wanted sparsity: one [1]."""
        return [(self.sparsity(probabilities) - self.target(progress)).reshape(1)]

    def project(self, gates: Gates, progress: float) -> Tensor:
        """The one shift [] after which the expected count is the wanted one, or as near as gates that never quite open
        or close allow.
        """
        values = gates.values()
        names = tuple(values)
        if names not in self._reach:  # it depends on which axes have gates, not on where the gates stand
            self._reach[names] = reachable(values, self.cost, self.of)
        least, most = self._reach[names]
        keep = min(max(1 - self.target(progress), least), most)
        return torch.tensor(shift_to_budget(values, self.cost, keep, self.of))


@dataclass(frozen=True)
class CountsPerLayer:
    """Keep the same number of units in every layer, one number per kind (LLM-Shearing, arXiv 2310.06694, section 2.1).

    Args:
        axes: the gated axes.
        counts: units kept in the end, by kind.
        cost, of: what the reported sparsity is measured in.
    """

    axes: Sequence[Axis]
    counts: Mapping[Kind, int]
    cost: Cost
    of: CostName = "blocks"

    @property
    def n_terms(self) -> int:
        """One pair of multipliers per kind."""
        return len(self._kinds())

    def _kinds(self) -> list[Kind]:
        return sorted({axis.kind for axis in self.axes})

    def _wanted(self, axis: Axis, progress: float) -> float:
        """Units of an axis that should be kept now."""
        return axis.size - (axis.size - min(self.counts[axis.kind], axis.size)) * progress

    def sparsity(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """1 - expected count / dense count, float64 []."""
        return 1 - self.cost(probabilities).count(self.of) / float(self.cost().count(self.of))

    def target(self, progress: float) -> float:
        """The sparsity of a model with the wanted number of units in every layer."""
        shares = {
            axis.name: torch.full((axis.size,), self._wanted(axis, progress) / axis.size, dtype=torch.float64)
            for axis in self.axes
        }
        return float(self.sparsity(shares))

    def gaps(self, probabilities: Mapping[str, Tensor], progress: float) -> list[Tensor]:
        """Per kind, each layer's expected minus wanted sparsity [layers], float32."""
        result: list[Tensor] = []
        for kind in self._kinds():
            of_kind = [axis for axis in self.axes if axis.kind == kind]
            result.append(
                torch.stack(
                    [(self._wanted(axis, progress) - probabilities[axis.name].sum()) / axis.size for axis in of_kind]
                )
            )
        return result

    def project(self, gates: Gates, progress: float) -> Tensor:
        """One shift per axis, as [n_gates], after which each axis' expected number of units is the wanted one."""
        shifts: list[Tensor] = []
        for axis, value in zip(gates.axes, gates.values().values(), strict=True):
            shift = _shift_to_count(value, self._wanted(axis, progress))
            shifts.append(torch.full((axis.size,), shift, device=value.device))
        return torch.cat(shifts)


def _shift_to_count(log_alpha: Tensor, wanted: float) -> float:
    """The shift s with sum keep_probability(clamp(log_alpha + s)) = wanted, or as near as the clamp range lets it come;
    by bisection.
    """
    span = hard_concrete.LOG_ALPHA_HIGH - hard_concrete.LOG_ALPHA_LOW
    low = hard_concrete.LOG_ALPHA_LOW - float(log_alpha.max()) - 1e-6
    high = low + span + float(log_alpha.max() - log_alpha.min()) + 2e-6
    exact = log_alpha.double()
    for _ in range(48):
        middle = (low + high) / 2
        shifted = (exact + middle).clamp(hard_concrete.LOG_ALPHA_LOW, hard_concrete.LOG_ALPHA_HIGH)
        if float(hard_concrete.keep_probability(shifted).sum()) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
