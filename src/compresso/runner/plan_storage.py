"""What a plan says of weights that are zeroed, rounded or given a low rank in place: how many, to how little, in which
memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compresso.runner.acted import Acted


def compressed_facts(one: Acted, compute_bytes: int) -> dict[str, Any] | None:
    """Of a stage that zeroes, rounds or gives a low rank; None for others.

    Args:
        one: the stage as it was acted out.
        compute_bytes: of a number while the stage works.

    Returns {"stage", "weights", "sparsity", "bits", "factored", "memory_bytes_estimated"}; "bits" is None where nothing
    is rounded, "factored" (numbers of the factors) where nothing gets a low rank.
    """
    if (found := one.compressed) is None:
        return None
    return {
        "stage": one.name,
        "weights": found.weights,
        "sparsity": found.sparsity,
        "bits": found.bits,
        "factored": found.factored,
        "memory_bytes_estimated": one.parameters * compute_bytes + (one.held or 0),
    }


def packed_bytes(parameters: int, stored: float, compressed: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes of the weights once those that were rounded last are packed; or, where none were, once those of low rank
    are factored; None where there are none of either.

    Args:
        parameters: of the result.
        stored: bytes of a number that is not packed.
        compressed: as `compressed_facts` gives them, in order.
    """
    rounded = [one for one in compressed if one["bits"] is not None]
    if not rounded:
        return _factored_bytes(parameters, stored, compressed)
    weights = min(rounded[-1]["weights"], parameters)
    return round((parameters - weights) * stored + weights * rounded[-1]["bits"] / 8)


def _factored_bytes(parameters: int, stored: float, compressed: Sequence[Mapping[str, Any]]) -> int | None:
    """As `packed_bytes`, of weights of low rank."""
    factored = [one for one in compressed if one["factored"] is not None]
    if not factored:
        return None
    return round((parameters - min(factored[-1]["weights"], parameters) + factored[-1]["factored"]) * stored)
