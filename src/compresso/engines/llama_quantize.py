"""K-quants of a GGUF file, made by llama.cpp: by its `llama-quantize` on the PATH, or else by the library that
node-llama-cpp brings.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compresso.arch.base import LayerShape
from compresso.engines import libllama, llama_cpp
from compresso.errors import ExportError, quoted
from compresso.formats.gguf import library

KINDS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
BLOCK = 256
"""Inputs that share a block; matrices of other widths fall back to larger types."""
_TOOL = "llama-quantize"


def tool(kind: str) -> list[str]:
    """The command that makes K-quants, without its last words. Raises ExportError, with what would do without it, if
    none is there.
    """
    if (program := shutil.which(_TOOL)) is not None:
        return [program]
    if (library := llama_cpp.shared_library()) is not None:
        return [sys.executable, "-P", libllama.__file__, str(library)]
    raise ExportError(
        f"{kind} is made by llama.cpp, and neither {_TOOL} is on the PATH nor node-llama-cpp is installed; "
        "install one of them, or write --dtype q4_0 or q8_0"
    )


def fallbacks(shapes: Sequence[LayerShape], hidden: int, head_dim: int) -> list[str]:
    """Sentences on inputs that are no multiple of 256; to be said before the run."""
    found = {f"hidden size {hidden}": hidden}
    for index, shape in enumerate(shapes):
        found[f"layers.{index} reads {shape.query_heads} heads x {head_dim}"] = shape.query_heads * head_dim
        found[f"layers.{index} reads {shape.channels} channels"] = shape.channels
    return [
        f"{what}: no multiple of {BLOCK}, so that matrix falls back to a larger type"
        for what, width in found.items()
        if width % BLOCK
    ]


def quantize(whole: Path, output: Path, kind: str) -> None:
    """Write `output` from an unquantized file. Raises ExportError with llama.cpp's last words if it fails."""
    command = tool(kind)
    named = kind.upper() if len(command) == 1 else str(library().LlamaFileType[f"MOSTLY_{kind.upper()}"].value)
    done = subprocess.run([*command, str(whole), str(output), named], capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        said = quoted(done.stderr or done.stdout, last=True)
        raise ExportError(f"llama.cpp could not write {kind} ({done.returncode}): {said}")
