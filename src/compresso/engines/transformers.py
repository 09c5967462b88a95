"""transformers, in a fresh process: with compresso imported, with the code beside the weights, or with neither."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from compresso.checkpoint.code import names_own_class, refuse_code, trusted
from compresso.checkpoint.scratch import scratch_folder
from compresso.engines import transformers_process
from compresso.engines.parity import ALWAYS, Format, Listed, Parity, Reference, judged, within_rounding
from compresso.errors import CheckpointError, quoted, without_escapes

WITHIN = {"f32": 1e-3}
"""Allowed differences of logits, as in `within_rounding`, by the dtype that was written: what rounding in float32
explains, or the half precision in which scales of few bits are stored.
"""
_HALF_WITHIN = 2e-2


@dataclass(frozen=True)
class Transformers:
    """transformers, told more or less about a folder.

    Args:
        words: for the process: `compresso` (import it first), `remote` (let the code beside the weights run).
    """

    name: str
    words: tuple[str, ...] = ()
    reads: Format = Format.CHECKPOINT
    command: str = ""
    program: str = "transformers"
    listed: Listed = ALWAYS

    def missing(self) -> str | None:
        """None: compresso itself needs it."""
        return None

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Open a folder in a fresh process.

        Where activations are rounded, here and there by steps of slightly different size, a difference of twice what
        rounding them makes is allowed.
        """
        refuse_code(written)
        remote = ("remote",) if self.reads is Format.PACKED and names_own_class(written) else ()
        words = (*self.words, *remote)
        if "remote" in words:
            try:
                trusted(written)
            except CheckpointError as error:
                return Parity(self.name, "not checked", str(error).replace(str(written), "this folder"))
        with scratch_folder() as scratch:
            given, result = scratch / "ids.safetensors", scratch / "logits.safetensors"
            save_file({"ids": reference.ids.contiguous()}, given)
            done = subprocess.run(
                [
                    sys.executable,
                    "-P",
                    transformers_process.__file__,
                    str(written.resolve()),
                    str(given),
                    str(result),
                    *words,
                ],
                env=self._environment(scratch, "remote" in words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = why(done.stderr, done.returncode).replace(str(written.resolve()), "this folder")
                return Parity(self.name, "no", reason)
            found = load_file(result)
        logits, wanted = found["logits"], reference.logits
        if logits.shape != wanted.shape:
            return Parity(self.name, "no", f"logits are {list(logits.shape)} instead of {list(wanted.shape)}")
        within = WITHIN.get(reference.dtype, _HALF_WITHIN)
        within += 2 * reference.rounding / max(1.0, float(wanted.abs().max()))
        difference = float((logits - wanted).abs().max())
        fits = within_rounding(logits, wanted, within)
        return judged(self.name, difference, fits, found["greedy"].tolist(), reference.greedy.tolist(), "logits")

    def _environment(self, scratch: Path, remote: bool) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        home = {"HF_MODULES_CACHE": str(scratch / "modules")} if remote else {}
        return os.environ | home | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


PLAIN = Transformers("transformers")
OWN = Transformers("transformers, compresso imported", ("compresso",))
REMOTE = Transformers("transformers, trust_remote_code", ("remote",))
PACKED = Transformers(
    "compressed-tensors, packed",
    reads=Format.PACKED,
    command="compresso export {folder} --format compressed-tensors --output {folder}-packed",
)
LOW_RANK = Transformers(
    "transformers, low rank",
    ("remote",),
    reads=Format.LOW_RANK,
    command="compresso export {folder} --format low-rank --output {folder}-low-rank",
    listed=Listed(if_absent=False),
)
SLICED = Transformers(
    "transformers, sliced",
    ("remote",),
    reads=Format.SLICED,
    command="compresso export {folder} --format sliced --output {folder}-sliced",
    listed=Listed(if_absent=False),
)
ENGINES = (PLAIN, OWN, REMOTE, PACKED, LOW_RANK, SLICED)


def why(stderr: str, code: int) -> str:
    """The last line of a traceback that names an exception."""
    lines = [line for line in without_escapes(stderr).strip().splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return quoted((named or lines or [f"ended with {code}"])[-1])
