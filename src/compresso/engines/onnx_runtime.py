"""Running a written ONNX folder in ONNX Runtime: logits, and greedy tokens with the cache."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.engines.parity import ALWAYS, Format, Listed, Parity, Reference, judged, within_rounding
from compresso.errors import quoted
from compresso.formats.onnx import GRAPH, library
from compresso.formats.onnx_cache import Cache, cache_names

WITHIN = {"f32": 1e-4, "f16": 1e-2}
"""Allowed differences of logits, as in `within_rounding`, by the dtype of the graph; for int8 any finite one."""


class OnnxModel:
    """A folder that `save_onnx` wrote, open in ONNX Runtime on the CPU.

    Args:
        folder: with `model.onnx` and `config.json`.
        threads: of a product; 0 for as many as there are cores.

    Raises ExportError if onnxruntime is not installed.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        self._known = self._open(Path(folder), threads)
        said = json.loads(Path(folder, "config.json").read_text("utf-8"))["compresso_cache"]
        self._cache = Cache.of_fields(said)

    def _open(self, folder: Path, threads: int) -> set[str]:
        """Open the graph; names of what it reads, for what it does not read is not among its inputs."""
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session: Any = runtime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        return {one.name for one in self._session.get_inputs()}

    def _run(self, given: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Logits, then keys and values."""
        return self._session.run(None, given)

    def empty(self, batch: int = 1) -> list[Tensor]:
        """A cache of no token: key and value [batch, heads, 0, width] of each attention."""
        return self._cache.zeros(batch, 0)

    def __call__(self, ids: Tensor, past: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Read a chunk.

        Args:
            ids: [batch, seq].
            past: the cache so far.
            mask: [batch, past + seq], 0 where a row was padded on its left; None for none.

        Returns:
            Logits [batch, seq, vocabulary] and the cache that is longer by seq.
        """
        length = (past[0].shape[2] if past else 0) + ids.shape[1]
        mask = torch.ones(len(ids), length, dtype=torch.long) if mask is None else mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given |= dict(zip(cache_names(len(self._cache.heads), "past_key_values"), past, strict=True))
        found = self._run({name: tensor.contiguous().numpy() for name, tensor in given.items() if name in self._known})
        logits, *cache = (torch.from_numpy(array) for array in found)
        return logits, cache

    def greedy(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The likeliest continuation of ids [seq], token by token [new_tokens]."""
        logits, past = self(ids.unsqueeze(0), self.empty())
        found: list[int] = []
        for _ in range(new_tokens):
            found.append(int(logits[0, -1].argmax()))
            logits, past = self(torch.tensor([[found[-1]]]), past)
        return torch.tensor(found)


@dataclass(frozen=True)
class OnnxEngine:
    """A runtime on a folder that `save_onnx` wrote.

    Args:
        package: that brings it.
        opening: opens the folder.
    """

    name: str
    program: str
    package: str
    opening: Callable[[Path], OnnxModel]
    command: str
    reads: Format = Format.ONNX
    listed: Listed = ALWAYS

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed; pip install {self.package}"

    def parity(self, written: Path, reference: Reference) -> Parity:
        """Compare logits of the prompt and of a cached step, and greedy tokens with the cache."""
        ids, wanted = reference.ids, reference.logits
        try:
            model = self.opening(written)
            found, cache = model(ids[:-1].unsqueeze(0), model.empty())
            last, _ = model(ids[-1:].unsqueeze(0), cache)
            tokens = model.greedy(ids, len(reference.greedy)).tolist()
        except RuntimeError as error:  # of the engine
            return Parity(self.name, "no", quoted(error))
        found = torch.cat([found, last], dim=1)[0]
        difference = float((found - wanted).abs().max())
        within = WITHIN.get(reference.dtype)
        fits = bool(found.isfinite().all()) if within is None else within_rounding(found, wanted, within)
        return judged(self.name, difference, fits, tokens, reference.greedy.tolist(), "logits")


ONNX = OnnxEngine(
    "ONNX Runtime, as ONNX",
    "ONNX Runtime",
    "onnxruntime",
    OnnxModel,
    "compresso export {folder} --format onnx --output {folder}-onnx",
)
ENGINES = (ONNX,)
