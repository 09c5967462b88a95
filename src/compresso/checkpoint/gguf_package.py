"""The gguf package, which is optional: how it stores numbers, and how it makes floats of them again."""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.errors import CheckpointError

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Ways to store numbers that are not codes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to store numbers: `block` of them in `bytes`.

    Args:
        number: the format's.
        name: such as Q4_K; "type 99" for one that the package does not know.
        readable: whether the package makes floats of them.
    """

    number: int
    name: str
    block: int
    bytes: int
    readable: bool


def library() -> Any:
    """The gguf package. Raises CheckpointError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF needs the gguf package; pip install gguf (the extra compresso-llm[gguf])"
        ) from error


@cache
def kind_of(number: int) -> Kind:
    """The way to store numbers that a file calls by this number. Raises CheckpointError without the package."""
    gguf = library()
    try:
        known = gguf.GGMLQuantizationType(number)
    except ValueError:
        return Kind(number, f"type {number}", 1, 1, False)
    block, size = gguf.GGML_QUANT_SIZES[known]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), known)
        readable = True
    except NotImplementedError:
        readable = False
    return Kind(number, known.name, block, size, readable)


def dequantized(rows: np.ndarray, kind: Kind) -> Tensor:
    """Floats of rows as they are stored.

    Args:
        rows: bytes [rows, bytes of a row].
        kind: how they are stored.

    Returns:
        float32 [rows, numbers of a row].
    """
    gguf = library()
    with np.errstate(all="ignore"):  # what is not finite is found, by name, when the weights are loaded
        floats = gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType(kind.number))
    return torch.from_numpy(np.require(floats, np.float32, ["C", "W"]))  # a view of a file is read-only
