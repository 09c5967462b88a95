"""What a plan says of weights that are zeroed or rounded in place: how many, to how little, in which memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from compresso.runner.dry_run import Acted


def compressed_facts(one: Acted, compute_bytes: int) -> dict[str, Any] | None:
    """Of a stage that zeroes or rounds; None for others.

    Args:
        one: the stage as it was acted out.
        compute_bytes: of a number while the stage works.

    Returns {"stage", "weights", "sparsity", "bits", "memory_bytes_estimated"}; "bits" is None where nothing is rounded.
    """
    if (found := one.compressed) is None:
        return None
    return {
        "stage": one.name,
        "weights": found.weights,
        "sparsity": found.sparsity,
        "bits": found.bits,
        "memory_bytes_estimated": one.parameters * compute_bytes + (one.held or 0),
    }


def packed_bytes(parameters: int, stored: float, compressed: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes of the weights once those that were rounded last are packed; None where none were.

    Args:
        parameters: of the result.
        stored: bytes of a number that is not packed.
        compressed: as `compressed_facts` gives them, in order.
    """
    rounded = [one for one in compressed if one["bits"] is not None]
    if not rounded:
        return None
    weights = min(rounded[-1]["weights"], parameters)
    return round((parameters - weights) * stored + weights * rounded[-1]["bits"] / 8)
