"""What is said about one discovered axis, or about a parameter that cannot be pruned: which tensors are removed
together, and which operation says so.
"""

from collections.abc import Iterator
from typing import Any

from compresso.discover.found import Discovery, Found
from compresso.errors import ArchError, nearest


def explain(discovery: Discovery, name: str) -> dict[str, Any]:
    """An axis by name, or a parameter that cannot be pruned.

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
    raise ArchError(f"no axis is called '{name}'; {nearest(name, [found.name for found in discovery.found])}")


def _tensors(found: Found) -> Iterator[dict[str, Any]]:
    for owner in found.owners:
        yield {"name": owner.param, "dim": owner.dim, "entries": len(owner.unit_of) // found.size, "why": owner.why}
    for part in found.whole:
        yield {"name": part.param, "dim": None, "entries": None, "why": f"only unit {part.unit} computes with it"}
