"""K-quants of a GGUF file, by llama.cpp's own `llama-quantize`, which has to be on the PATH."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from compresso.arch.base import LayerShape
from compresso.errors import ExportError

KINDS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
BLOCK = 256
"""Inputs that share a block; matrices of other widths fall back to larger types."""
_TOOL = "llama-quantize"


def tool(kind: str) -> str:
    """The program. Raises ExportError, with what would do without it, if it is not there."""
    found = shutil.which(_TOOL)
    if found is None:
        raise ExportError(
            f"{kind} is made by llama.cpp's {_TOOL}, which is not on the PATH; install llama.cpp, or write --dtype q4_0 or q8_0"
        )
    return found


def fallbacks(shapes: Sequence[LayerShape], hidden: int, head_dim: int) -> list[str]:
    """Sentences on inputs that are no multiple of 256; to be said before the run."""
    found = {f"hidden size {hidden}": hidden}
    for index, shape in enumerate(shapes):
        found[f"layers.{index} reads {shape.query_heads} heads x {head_dim}"] = shape.query_heads * head_dim
        found[f"layers.{index} reads {shape.channels} channels"] = shape.channels
    return [f"{what}: no multiple of {BLOCK}, so that matrix falls back to a larger type" for what, width in found.items() if width % BLOCK]


def quantize(whole: Path, output: Path, kind: str) -> None:
    """Write `output` from an unquantized file. Raises ExportError with the tool's last words if it fails."""
    done = subprocess.run([tool(kind), str(whole), str(output), kind.upper()], capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ExportError(f"{_TOOL} could not write {kind} ({done.returncode}): {said}")
