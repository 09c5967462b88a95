"""Whole files timed in the engine that opens them: ONNX Runtime on exported graphs, llama.cpp on GGUF files.

All files take turns. What is timed is the engine's own forward with its cache, as the program would be served.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.core.latency_table import Conditions
from compresso.engines import llama_cpp
from compresso.engines.onnx_runtime import ONNX, OnnxModel
from compresso.errors import DataError, ExportError, quoted
from compresso.formats.gguf import save_gguf
from compresso.formats.onnx import save_onnx
from compresso.metrics.forwards import TOKENS
from compresso.metrics.timed_generation import prompts

_SCRIPT = Path(__file__).with_name("llama_cpp_times.mjs")


class FileTimer(Protocol):
    """An engine that times what it opens."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the weights, the first being what nobody chose."""
        ...

    @property
    def step(self) -> int:
        """Channels of a file that is no wider for them come in multiples of this."""
        ...

    @property
    def packages(self) -> Mapping[str, str]:
        """Its Python packages, by the names that records have for them."""
        ...

    @property
    def suffix(self) -> str:
        """Of a file's name."""
        ...

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        ...

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
        """Write a live float32 model where nothing is yet. Raises ExportError."""
        ...

    def times(
        self, paths: Sequence[Path], conditions: Conditions, rounds: int, threads: int, vocabulary: int
    ) -> list[list[float]]:
        """Milliseconds of single forwards of each file, the files in turn, after a turn that does not count.

        Args:
            paths: as `write` left them.
            conditions: what a forward is.
            rounds: turns that count.
            threads: that the engine may use.
            vocabulary: random tokens are drawn from.

        Raises:
            DataError: conditions that the engine does not know.
            ExportError: it does not open a file.
        """
        ...


@dataclass(frozen=True)
class OnnxTimer:
    """ONNX Runtime on the CPU."""

    dtypes: tuple[str, ...] = ("f32", "int8")
    step: int = 1
    suffix: str = ""
    packages: Mapping[str, str] = field(default_factory=lambda: {"onnxruntime": "onnxruntime", "onnx": "onnx"})

    def missing(self) -> str | None:
        """See `FileTimer`."""
        return ONNX.missing()

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
        """See `FileTimer`."""
        save_onnx(model, arch_for(model.config).shapes(model), path, tokenizer, dtype=dtype)

    def times(
        self, paths: Sequence[Path], conditions: Conditions, rounds: int, threads: int, vocabulary: int
    ) -> list[list[float]]:
        """See `FileTimer`."""
        models = [OnnxModel(path, threads) for path in paths]
        decoding = conditions.phase == "decode"
        each = TOKENS if decoding else 1
        length = max(1, conditions.context - each * (rounds + 1) // 2) if decoding else conditions.context
        ids = prompts(conditions.batch, length, vocabulary, 0)
        caches = [model.empty(conditions.batch) for model in models]
        found: list[list[float]] = [[] for _ in models]
        for turn in range(rounds + 1):
            for number, model in enumerate(models):
                if turn == 0 and decoding:
                    caches[number] = model(ids, caches[number])[1]
                for _ in range(each):
                    begun = time.perf_counter()
                    _, cache = model(ids[:, -1:] if decoding else ids, caches[number])
                    if turn:
                        found[number].append(1000 * (time.perf_counter() - begun))
                    if decoding:
                        caches[number] = cache
        return found


@dataclass(frozen=True)
class LlamaCppTimer:
    """llama.cpp on the CPU, through node-llama-cpp."""

    dtypes: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")
    step: int = 32
    suffix: str = ".gguf"
    packages: Mapping[str, str] = field(default_factory=lambda: {"gguf": "gguf"})

    def missing(self) -> str | None:
        """See `FileTimer`."""
        return llama_cpp.missing()

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
        """See `FileTimer`."""
        if tokenizer is None:
            raise ExportError("a GGUF file holds a tokenizer, and the model has none; give a model that brings one")
        save_gguf(model, arch_for(model.config).shapes(model), path, tokenizer, dtype)

    def times(
        self, paths: Sequence[Path], conditions: Conditions, rounds: int, threads: int, vocabulary: int
    ) -> list[list[float]]:
        """See `FileTimer`."""
        if conditions.batch != 1:
            raise DataError(f"--batch {conditions.batch}: llama.cpp is timed on one sequence; give --batch 1")
        ids: list[int] = prompts(1, conditions.context, vocabulary, 0)[0].tolist()  # pyright: ignore
        asked = {
            "files": [str(path.resolve()) for path in paths],
            "prompt": ids,
            "phase": conditions.phase,
            "forwards": TOKENS,
            "rounds": rounds,
            "threads": threads,
        }
        done = subprocess.run(
            ["node", str(_SCRIPT), str(llama_cpp.modules())],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ExportError(f"llama.cpp could not be timed: {quoted(done.stderr, 400, last=True)}")
        told: list[list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
        return told


TIMERS: dict[str, FileTimer] = {"onnxruntime": OnnxTimer(), "llama.cpp": LlamaCppTimer()}
"""By the name of the engine; torch is timed module by module."""


def timer_of(engine: str) -> FileTimer:
    """The engine that times files.

    Raises:
        ExportError: it is not here.
    """
    timer = TIMERS[engine]
    if (reason := timer.missing()) is not None:
        raise ExportError(f"--engine {engine} cannot be timed: {reason}")
    return timer
