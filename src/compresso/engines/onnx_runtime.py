"""Running a written ONNX folder in ONNX Runtime: logits, and greedy tokens with the cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.formats.onnx import GRAPH, cache_names, library


class OnnxModel:
    """A folder that `save_onnx` wrote, open in ONNX Runtime on the CPU.

    Args:
        folder: with `model.onnx` and `config.json`.
        threads: of a product; 0 for as many as there are cores.

    Raises ExportError if onnxruntime is not installed.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        self._known = self._open(Path(folder), threads)
        cache = json.loads(Path(folder, "config.json").read_text("utf-8"))["compresso_cache"]
        self._heads: list[int] = cache["heads"]
        self._width: int = cache["head_dim"]

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
        """A cache of no token: key and value [batch, heads, 0, head_dim] of each attention."""
        return [torch.zeros(batch, heads, 0, self._width) for heads in self._heads for _ in ("key", "value")]

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
        given |= dict(zip(cache_names(len(self._heads), "past_key_values"), past, strict=True))
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
