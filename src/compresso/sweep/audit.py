"""What a weight method really changed: every tensor of the model is looked at before and after, whether or not it was
meant to change.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from compresso.errors import NumericError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDTH = 1024
Fingerprints = Mapping[str, tuple[int, ...]]


def fingerprints(tensors: Mapping[str, Tensor]) -> Fingerprints:
    """Sums over the bits of every tensor, by name; changed values change them, but for rare accidents. They are looked
    at one by one.
    """
    return {name: _fingerprint(tensors[name]) for name in tensors}


def digest(value: Any) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def audit(
    tensors: Mapping[str, Tensor], before: Fingerprints, meant: Collection[str], rescaled: Collection[str] = ()
) -> dict[str, Any]:
    """What changed since fingerprints were taken.

    Args:
        tensors: the model's, as they are now.
        before: of the same tensors.
        meant: names of the linears that were to change, or of matrices of a stack, which count as the stack.
        rescaled: names of further parameters that may.

    Returns:
        sparsity (share of zeros in these weights), zeros (name -> "zeros/entries"), changed (how many tensors), and
        meant_but_unchanged.

    Raises:
        NumericError: another tensor changed.
    """
    weights = {full if (full := f"{name}.weight") in before else name.rpartition(".")[0] for name in meant}
    changed, zeros, entries = list[str](), dict[str, int](), dict[str, int]()
    for name in tensors:
        tensor = tensors[name]
        if _fingerprint(tensor) != before.get(name):
            changed.append(name)
        if name in weights:
            zeros[name], entries[name] = int((tensor == 0).sum()), tensor.numel()
    if astray := [name for name in changed if name not in {*weights, *rescaled}]:
        raise NumericError(f"{astray[0]} changed and was not meant to; nothing was written. Please report this")
    return {
        "sparsity": sum(zeros.values()) / max(sum(entries.values()), 1),
        "zeros": {name: f"{zeros[name]}/{entries[name]}" for name in sorted(zeros)},
        "changed": len(changed),
        "meant_but_unchanged": sorted(weights - set(changed)),
    }


def _fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """Sums modulo 2^64 over all entries' bits: plain, and weighted by row and by column of a table that the bits are
    laid out in.
    """
    flat = tensor.detach().reshape(-1).contiguous()
    bits = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    whole = bits.view(torch.int64) if flat.nbytes % 8 == 0 and len(flat) else bits.to(torch.int64)
    size = len(whole) // _WIDTH * _WIDTH
    sums: list[int] = []
    for table in (whole[:size].view(-1, _WIDTH), whole[size:].view(1, -1)):
        rows, columns = table.sum(dim=1), table.sum(dim=0)
        weights = [torch.arange(1, len(one) + 1, device=one.device) for one in (rows, columns)]
        sums += [int(rows.sum()), int((rows * weights[0]).sum()), int((columns * weights[1]).sum())]
    return tuple(sums)
