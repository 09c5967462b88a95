"""One differentiable function that counts the dense model, the expected model under soft masks and the shrunk model.

A parameter's count is a product: for each dimension the kept entries, times one factor for each unit that owns the
whole tensor. With keep probabilities instead of 0/1 masks the same product is the expected count (gates are
independent), in closed form and in time linear in the number of gates: Compresso's expected size (arXiv 2310.05015, L0
objective) without a [hidden, layers x ffn] product. Where axes lie within the units of another, a dimension's factor is
a sum over these units (`compresso.core.grid`). Sums run in float64: LLaMA-7B's 6.7e9 entries do not fit float32's
24 bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.grid import Grid
from compresso.core.plan import Plan
from compresso.core.products import padded, products_of
from compresso.core.quantities import Amounts, Cost, CostName
from compresso.core.quantities import Counted as Counted
from compresso.core.weight import Group as Group
from compresso.core.weight import Weight as Weight


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts, each a float64 scalar Tensor [] (differentiable where the masks are).

    `total` counts parameters with tied ones once; `macs` is multiply-accumulates per token in matrices with a full
    head, attention scores excluded (they depend on the context length); `cached` is key/value cache entries per token;
    `active` is the parameters that a token meets: of experts those that are chosen for it, of all else everything;
    `bytes` is what the weights take, None where their bits are not known; `measured` has what else is asked for.
    """

    total: Tensor
    blocks: Tensor
    embeddings: Tensor
    norms: Tensor
    macs: Tensor
    cached: Tensor
    active: Tensor
    bytes: Tensor | None = None
    measured: Mapping[CostName, Callable[[], Amounts]] = field(default_factory=dict[CostName, Callable[[], Amounts]])

    def count(self, of: CostName) -> Tensor:
        """The count that a budget is a share of [].

        Raises:
            ValueError: what shapes do not determine.
        """
        known = {"blocks": self.blocks, "total": self.total, "macs": self.macs, "kv": self.cached}
        if of in known:
            return known[of]
        if of == "bytes" and self.bytes is not None:
            return self.bytes
        if of in self.measured:
            return self.measured[of]().count(of)
        cure = {
            "bytes": "give the bits of its weights",
            "bytes_at_context": "say at which: --bytes-at-context 4096",
        }.get(of, "measure a table with `compresso latency` and count with it: --latency-table")
        raise ValueError(f"of='{of}' does not follow from the shapes of a model; {cure}")

    def parameters(self) -> dict[str, int]:
        """The four parameter counts as whole numbers."""
        return {name: round(float(getattr(self, name).detach())) for name in ("total", "blocks", "embeddings", "norms")}


class CostModel:
    """Counts a model described by its axes and its weights, under any masks.

    Example:
        cost = CostModel(axes, weights)
        cost()                      # dense
        cost(plan.masks(axes))      # after removal
        cost(keep_probabilities)    # expected, with gradients
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        weights: Sequence[Weight],
        bits: Mapping[str, float] | None = None,
        measured: Mapping[CostName, Cost] | None = None,
    ) -> None:
        """Compile the products.

        Args:
            axes, weights: of the model.
            bits: parameter name -> bits that an entry is stored in; None leaves bytes uncounted.
            measured: what does not follow from shapes -> what measures it.

        Raises:
            ValueError: a slice names an unknown parameter or does not fit its shape, or a parameter has no bits, or
                axes within another do not lie in its units alike.
        """
        self.axes = tuple(axes)
        self.weights = tuple(weights)
        self.measured = dict(measured or {})
        products = products_of(self.axes, self.weights)
        self._atoms, factors, rows, chosen = products.atoms, products.factors, products.rows, products.chosen
        constants, row_constants = products.constants, products.row_constants

        self._factors = padded([factors[weight.name] for weight in self.weights])
        self._chosen = padded(
            [[one for one in factors[weight.name] if one != chosen.get(weight.name)] for weight in self.weights]
        )
        self.routes = any(weight.routed for weight in self.weights)
        self._rows = padded([rows[weight.name] for weight in self.weights])
        entries = torch.tensor([constants[weight.name] for weight in self.weights], dtype=torch.float64)
        groups = [
            torch.tensor([float(weight.group == group) for weight in self.weights], dtype=torch.float64)
            for group in Group
        ]
        macs = torch.tensor([float(weight.macs) for weight in self.weights], dtype=torch.float64)
        self._entry_coefficients = torch.stack([entries * column for column in groups])  # [3, weights]
        used = [
            weight.routed / (1 if weight.name in chosen else weight.shape[0]) if weight.routed else 1.0
            for weight in self.weights
        ]
        met = entries * torch.tensor(used, dtype=torch.float64)
        self._active_coefficients = torch.stack([met * macs, met])  # [2, weights]
        self._row_coefficients = torch.tensor(row_constants, dtype=torch.float64)
        self._byte_coefficients: Tensor | None = None
        if bits is not None:
            if lacking := [weight.name for weight in self.weights if weight.name not in bits]:
                raise ValueError(f"bits of '{lacking[0]}' are missing; give those of every parameter")
            sizes_of = torch.tensor([bits[weight.name] / 8 for weight in self.weights], dtype=torch.float64)
            self._byte_coefficients = entries * sizes_of
        self._ones = {axis.name: axis.size for axis in self.axes}
        dense = [
            float(what.dense) if isinstance(what, Grid) else self._ones[axis] if what == "sum" else 1.0
            for axis, what in self._atoms
        ]
        self._dense = torch.tensor([1.0, *dense], dtype=torch.float64)
        self._of_axis: dict[str, list[tuple[int, int | str]]] = {}
        self._grids: list[tuple[int, str, Grid]] = []
        for column, (name, what) in enumerate(self._atoms, start=1):
            if isinstance(what, Grid):
                self._grids.append((column, name, what))
            else:
                self._of_axis.setdefault(name, []).append((column, what))
        self._inner = {axis.name for axis in self.axes if axis.within is not None}
        self._outer = (  # what counts masks that name none of them, to the last bit as if there were none
            CostModel([axis for axis in self.axes if axis.within is None], self.weights, bits) if self._inner else None
        )
        self._counted_dense: Counts | None = None
        self._owning: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        self._there: dict[torch.device, tuple[Tensor, ...]] = {}
        self._filled: dict[tuple[torch.device, tuple[str, ...]], tuple[tuple[Tensor, Tensor], ...]] = {}

    def __call__(self, masks: Mapping[str, Tensor] | None = None) -> Counts:
        """Count under masks or keep probabilities: axis name -> [size], values in [0, 1]; an absent axis keeps all its
        units.
        """
        return self._with_measured(self._under(masks or {}), lambda cost: cost(masks))

    def _with_measured(self, counts: Counts, measure: Callable[[Cost], Amounts]) -> Counts:
        """The counts, and what else measures the model, which nobody may ask for."""
        if not self.measured:
            return counts
        return replace(counts, measured={of: partial(measure, cost) for of, cost in self.measured.items()})

    def _under(self, masks: Mapping[str, Tensor]) -> Counts:
        """What the products count."""
        unknown = set(masks) - set(self._ones)
        if unknown:
            raise ValueError(f"masks name unknown axes: {sorted(unknown)[:4]}")
        if self._outer is not None and self._inner.isdisjoint(masks):
            return self._outer(masks)
        if not masks:
            if self._counted_dense is None:
                with torch.inference_mode(False):  # what is kept may be asked for in any mode
                    self._counted_dense = self._count(self._dense)
            return self._counted_dense
        totals = torch.stack([mask.sum(dtype=torch.float64) for mask in masks.values()])
        picked = [masks[name][unit].to(torch.float64) for name, unit in self._units(masks)]
        atoms = self._atoms_of(tuple(masks), totals, torch.stack(picked) if picked else totals)
        for column, outer, grid in self._grids:
            if outer in masks or not masks.keys().isdisjoint(grid.inner):
                entries = grid.entries(masks.get(outer), masks, atoms.device)
                atoms = atoms.index_copy(0, torch.tensor([column], device=atoms.device), entries.reshape(1))
        return self._count(atoms)

    def even(self, of: CostName) -> bool:
        """Whether a unit of an axis costs the same however many stay: a product is linear in each of its factors."""
        return self.measured[of].even(of) if of in self.measured else True

    def of_totals(self, names: Sequence[str], totals: Tensor) -> Counts:
        """Count from how many units of each axis are expected to be kept, without their masks; other axes keep all.

        Args:
            names: axes, none of whose units owns whole tensors (heads, channels and hidden dimensions, not layers).
            totals: [axes], float64; on any device.

        Raises:
            ValueError: an axis whose total does not say what its units cost.
        """
        if owning := [name for name, _ in self._units(names)]:
            raise ValueError(
                f"units of {owning[0]} own whole tensors, so that it matters which of them are kept; count by masks"
            )
        if within := sorted(self._inner.intersection(names)):
            raise ValueError(f"units of {within[0]} lie within those of another axis; count by masks")
        counter = self._outer or self
        counted = counter._count(counter._atoms_of(tuple(names), totals, totals))
        return self._with_measured(counted, lambda cost: cost.of_totals(names, totals))

    def tiled(self, names: Sequence[str]) -> bool:
        """Whether totals alone decide what these axes cost."""
        tiled = not self._units(names) and self._inner.isdisjoint(names)
        return tiled and all(cost.tiled(names) for cost in self.measured.values())

    def _atoms_of(self, names: tuple[str, ...], totals: Tensor, picked: Tensor) -> Tensor:
        """The scalars of all products, given the axes' totals [axes] and their single units' values."""
        any_kept = (totals.detach() > 0).to(torch.float64)  # masks are never negative
        atoms = self._on(totals.device)[0]
        for values, (columns, rows) in zip(
            (totals, any_kept, picked), self._columns(names, totals.device), strict=True
        ):
            atoms = atoms.index_copy(0, columns, values[rows])
        return atoms

    def _count(self, atoms: Tensor) -> Counts:
        """The products, summed by group."""
        _, entry_coefficients, active_coefficients, row_coefficients, factors, chosen, rows = self._on(atoms.device)
        products = atoms[factors].prod(dim=1)
        entries = entry_coefficients @ products
        macs, active = (
            active_coefficients @ (atoms[chosen].prod(dim=1) if self.routes else products)
        ).unbind()  # a token meets top-k experts, however many there are
        stored = None
        if self._byte_coefficients is not None:
            stored = self._byte_coefficients.to(atoms.device) @ products
        cached = row_coefficients @ atoms[rows].prod(dim=1)
        blocks, embeddings, norms = entries.unbind()
        return Counts(blocks + embeddings + norms, blocks, embeddings, norms, macs, cached, active, stored)

    def _units(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """The single units of these axes that own whole tensors: axis name and index."""
        key = tuple(names)
        if key not in self._owning:
            self._owning[key] = [
                (name, int(what))
                for name in key
                for _, what in self._of_axis.get(name, ())
                if what not in ("sum", "any")
            ]
        return self._owning[key]

    def _columns(self, names: tuple[str, ...], device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """For sums, presences and single units: the atoms to fill and the rows of the values that fill them, on the
        device; kept.
        """
        key = (device, names)
        if key not in self._filled:
            filled: tuple[list[tuple[int, int]], ...] = ([], [], [])
            for row, name in enumerate(names):
                for column, what in self._of_axis.get(name, ()):
                    kind = 0 if what == "sum" else 1 if what == "any" else 2
                    filled[kind].append((column, len(filled[2]) if kind == 2 else row))
            self._filled[key] = tuple(
                (
                    torch.tensor([column for column, _ in pairs], dtype=torch.long, device=device),
                    torch.tensor([row for _, row in pairs], dtype=torch.long, device=device),
                )
                for pairs in filled
            )
        return self._filled[key]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The constants of the products, on a device; moved there once."""
        if device not in self._there:
            constants = (
                *(self._dense, self._entry_coefficients, self._active_coefficients, self._row_coefficients),
                *(self._factors, self._chosen, self._rows),
            )
            self._there[device] = tuple(constant.to(device) for constant in constants)
        return self._there[device]

    def of(self, plan: Plan) -> Counts:
        """Count the model that a plan leaves. Raises ValueError for a plan of axes that are not counted."""
        if unknown := sorted(set(plan.kept) - set(self._ones)):
            raise ValueError(f"the plan names {unknown[0]}, which is not counted; count with its kind of axes, too")
        return self(plan.masks(self.axes))
