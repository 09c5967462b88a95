"""What is said about one discovered axis, or about a parameter that cannot be pruned: which tensors are removed
together, and which operation says so.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from compresso.core.axis import Axis
from compresso.discover.found import Discovery, Found
from compresso.errors import ArchError, nearest


def explain(discovery: Discovery, name: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """An axis by name, or a parameter that cannot be pruned; `others` are names that are known elsewhere.

    Returns `{"name", "kind", "size", "tensors": [{"name", "dim", "entries", "why"}], "masked_at", "folded_norms"}`.
    `entries` are those of one unit along `dim`, both None where a unit owns the whole tensor. For a parameter that
    stays: `{"name", "stays": [sentences]}`.

    Raises:
        ArchError: neither is called so.
    """
    for found in discovery.found:
        if found.name == name:
            return {
                "name": name,
                "kind": str(found.kind),
                "size": found.size,
                "tensors": list(_tensors(found)),
                "masked_at": [f"{gate.side} of {gate.module}" for gate in found.gates],
                "folded_norms": list(found.norms),
            }
    held = [(dim, fixed) for fixed in discovery.fixed for param, dim in fixed.sources if param == name]
    reasons = [f"dimension {dim}: {fixed.why} at {fixed.place}" for dim, fixed in held]
    if reasons:
        return {"name": name, "stays": reasons}
    known = dict.fromkeys([*(found.name for found in discovery.found), *others])
    raise ArchError(f"no axis is called '{name}'; {nearest(name, known)}")


def explain_axis(axis: Axis) -> dict[str, Any]:
    """The same of an axis that no trace found, but its architecture's description names."""
    why = "the description of the architecture says so"
    tiled = [(param, dim, sum(one.width for one in pieces)) for (param, dim), pieces in axis.tilings().items()]
    whole = dict.fromkeys(piece.param for piece in axis.slices if piece.unit is not None)
    tensors = [{"name": param, "dim": dim, "entries": entries, "why": why} for param, dim, entries in tiled]
    return {
        "name": axis.name,
        "kind": str(axis.kind),
        "size": axis.size,
        "tensors": [*tensors, *({"name": param, "dim": None, "entries": None, "why": why} for param in whole)],
        "masked_at": [f"{gate.side} of {gate.module}" for gate in axis.gates],
        "folded_norms": list(axis.norms),
    }


def _tensors(found: Found) -> Iterator[dict[str, Any]]:
    for owner in found.owners:
        yield {"name": owner.param, "dim": owner.dim, "entries": len(owner.unit_of) // found.size, "why": owner.why}
    for part in found.whole:
        yield {"name": part.param, "dim": None, "entries": None, "why": f"only unit {part.unit} computes with it"}
