"""A GGUF file opened in llama.cpp: its own tokens, greedy continuations and probabilities.

The engine is the npm package node-llama-cpp, which ships it built for CPUs. It is looked for in the folder that the
environment variable COMPRESSO_NODE_MODULES names, then beside the Python environment, then in the current folder.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compresso.engines.parity import ALWAYS, TEXT, Format, Listed, Parity, Reference, judged
from compresso.errors import ExportError, quoted

WITHIN = {"f32": 1e-2, "f16": 0.1, "bf16": 0.1}
"""Allowed differences of probabilities, by the dtype of the file; how far a quantised model goes from its source is its
user's to judge.
"""
_SCRIPT = Path(__file__).with_suffix(".mjs")


@dataclass(frozen=True)
class Continued:
    """A text continued by llama.cpp.

    Args:
        tokens: ids of the text, with the token that begins it.
        greedy: ids of the likeliest next tokens, one after the other.
        probabilities: of all ids before each of these [new_tokens, vocabulary].
    """

    tokens: list[int]
    greedy: list[int]
    probabilities: list[list[float]]


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on a GGUF file."""

    name: str = "llama.cpp, as GGUF"
    reads: Format = Format.GGUF
    command: str = (
        "compresso export {folder} --format gguf --output {folder}.gguf --dtype q8_0\nllama-cli -m {folder}.gguf -p"
        " 'Once upon a time'"
    )
    program: str = "llama.cpp"
    listed: Listed = ALWAYS

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        return missing()

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Compare its tokens of a text, its probabilities after the text, and its greedy tokens."""
        try:
            (found,) = continue_texts(written, [TEXT], len(reference.greedy))
        except ExportError as error:
            return Parity(self.name, "no", str(error))
        ids = reference.ids.tolist()
        if found.tokens != ids:
            return Parity(self.name, "no", f"it reads the text as tokens {found.tokens}, transformers as {ids}")
        difference = float((torch.tensor(found.probabilities[0]) - reference.logits[-1].softmax(-1)).abs().max())
        fits = difference <= WITHIN.get(reference.dtype, 1.0)
        return judged(self.name, difference, fits, found.greedy, reference.greedy.tolist(), "probabilities")


LLAMA_CPP = LlamaCpp()
ENGINES = (LLAMA_CPP,)


def missing() -> str | None:
    """Why llama.cpp cannot be run here; None if it can."""
    if shutil.which("node") is None:
        return "node is not installed"
    if modules() is None:
        return (
            "node-llama-cpp is not installed; npm install --ignore-scripts --prefix"
            " \"$(python -c 'import sys; print(sys.prefix)')\" node-llama-cpp"
        )
    return None


def continue_texts(
    file: Path | str, texts: Sequence[str], new_tokens: int = 8, timeout: float = 600.0
) -> list[Continued]:
    """Open a GGUF file in a process of its own and continue each text.

    Args:
        timeout: seconds for all texts.

    Raises ExportError if llama.cpp is not installed, refuses the file or dies of it.
    """
    if (reason := missing()) is not None:
        raise ExportError(reason)
    question = {"file": str(Path(file).resolve()), "texts": list(texts), "new_tokens": new_tokens}
    try:
        done = subprocess.run(
            ["node", str(_SCRIPT), str(modules())],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"llama.cpp did not answer about {file} within {timeout:g} s.") from error
    if done.returncode:
        said = quoted(done.stderr, 400, last=True)
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else "refuses it"
        raise ExportError(f"{file} does not open in llama.cpp, which {how}: {said}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [Continued(*one) for one in zip(found["tokens"], found["greedy"], found["probabilities"], strict=True)]


def shared_library() -> Path | None:
    """llama.cpp's own library, as node-llama-cpp ships it; None if it is not here."""
    there = modules()
    found = sorted(there.glob("@node-llama-cpp/*/bins/*/libllama.*")) if there else []
    return found[0] if found else None


def modules() -> Path | None:
    """The node_modules folder with node-llama-cpp in it."""
    named = os.environ.get("COMPRESSO_NODE_MODULES")
    places = ([Path(named)] if named else []) + [Path(sys.prefix, "node_modules"), Path("node_modules")]
    return next(
        (place.resolve() for place in places if (place / "node-llama-cpp" / "dist" / "index.js").is_file()), None
    )
