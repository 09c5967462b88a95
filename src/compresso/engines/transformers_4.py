"""A checkpoint opened in transformers 4.57, in an environment of its own: most readers of its time read as it does.

Its Python is the one that the variable COMPRESSO_TRANSFORMERS_4_PYTHON names, or that of an environment
`transformers-4` inside this one (`make transformers-4`). Compared are logits, greedy tokens and the ids of a text.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from compresso.checkpoint.code import refuse_code
from compresso.engines.parity import ALWAYS, TEXT, Format, Listed, Parity, Reference, judged, within_rounding
from compresso.engines.transformers import WITHIN, why

TESTED = "transformers 4.57.3"
_VARIABLE = "COMPRESSO_TRANSFORMERS_4_PYTHON"
_SCRIPT = Path(__file__).with_name("transformers_4_process.py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Transformers4:
    """transformers 4.57 on a folder; no code beside the weights is run."""

    name: str = "transformers 4.57"
    program: str = "transformers 4.57"
    reads: Format = Format.CHECKPOINT
    command: str = ""
    listed: Listed = ALWAYS

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        return missing()

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Compare logits, greedy tokens and, where there is a tokenizer, the ids it gives the text of the reference."""
        refuse_code(written)
        folder = written.resolve()
        tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
        with tempfile.TemporaryDirectory() as scratch:
            given, result = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
            save_file({"ids": reference.ids.contiguous()}, given)
            done = subprocess.run(
                [str(python()), "-P", str(_SCRIPT), str(folder), str(given), str(result), TEXT if tokenizer else ""],
                env=_environment(scratch),
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                return Parity(self.name, "no", why(done.stderr, done.returncode).replace(str(folder), "this folder"))
            found = load_file(result)
        ids, wanted = found["text"].tolist() if tokenizer else [], reference.ids.tolist()
        has_rows = bool(ids) and max(ids) < reference.logits.shape[1]  # else the reference is of other ids
        if has_rows and ids != wanted:
            return Parity(self.name, "no", f"the text '{TEXT[:20]}...' has ids {ids[:6]} instead of {wanted[:6]}")
        logits, wanted = found["logits"], reference.logits
        if logits.shape != wanted.shape:
            return Parity(self.name, "no", f"logits are {list(logits.shape)} instead of {list(wanted.shape)}")
        difference = float((logits - wanted).abs().max())
        fits = within_rounding(logits, wanted, WITHIN["f32"])
        return judged(self.name, difference, fits, found["greedy"].tolist(), reference.greedy.tolist(), "logits")


ENGINES = (Transformers4(),)


def missing() -> str | None:
    """Why transformers 4.57 cannot be run here; None if it can."""
    if (named := os.environ.get(_VARIABLE)) and not Path(named).is_file():
        return f"{_VARIABLE}={named} is no file"
    if python() is not None:
        return None
    return f"no environment with it; {_VARIABLE} can name the Python of one ({TESTED} was tried)"


def python() -> str | None:
    """The Python that has it."""
    if named := os.environ.get(_VARIABLE):
        return named
    inside = Path(sys.prefix, "transformers-4")
    whole = any(inside.glob("lib/python*/site-packages/transformers/__init__.py"))
    return str(inside / "bin" / "python") if whole else None


def _environment(scratch: str) -> dict[str, str]:
    """The variables of the process: those of this one but for its modules."""
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return mine | {
        "HF_MODULES_CACHE": str(Path(scratch, "modules")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
