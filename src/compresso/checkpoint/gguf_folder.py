"""A GGUF file as a folder of safetensors that lasts as long as this process.

The folder lies in the system's place for temporary files (TMPDIR), is made once for each file, and goes when the
process ends; what a killed process left goes with the next. Config and tokenizer are written at once, weights when they
are asked for: one tensor after the other, in shards of 500 MB, so that memory holds one of each. Floats keep their
dtype. Codes of few bits become bfloat16, whose rounding is a small part of theirs, and whose range is that of float32.
"""

import atexit
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from compresso.arch.base import LayerShape
from compresso.checkpoint.atomic import write_json
from compresso.checkpoint.folder import INDEX, SINGLE
from compresso.checkpoint.gguf_config import config_of
from compresso.checkpoint.gguf_fields import Fields
from compresso.checkpoint.gguf_header import MAGIC, GgufHeader, GgufTensor, read_gguf_header
from compresso.checkpoint.gguf_names import FACTORS, Source, parameter_of
from compresso.checkpoint.gguf_package import FLOATS, dequantized
from compresso.checkpoint.gguf_tokens import has_tokens, special_ids, write_tokenizer
from compresso.checkpoint.scratch import new_scratch
from compresso.checkpoint.storage import storage_errors
from compresso.checkpoint.tensors import listed
from compresso.errors import CheckpointError, ResourceError

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SHARD_BYTES = 500_000_000
_CHUNK = 16_000_000  # numbers that are floats at once


def is_gguf(path: Path) -> bool:
    """Whether a file is called GGUF, or begins as one: caches drop the suffix."""
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without config.json; None if the folder has a config or no such file.

    Raises:
        CheckpointError: if there are several.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    if not found or (folder / "config.json").exists():
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} GGUF files: {listed([path.name for path in found])}. Give one of them."
        )
    return found[0]


@dataclass
class GgufModel:
    """A GGUF file that was described, and the folder that stands for it.

    Args:
        header: of the file.
        folder: with config.json and tokenizer, and the weights once they are written.
        shapes: widths of the layers.
        dtype: of the weights.
        sources: where each parameter comes from.
        written: whether the weights lie there.
    """

    header: GgufHeader
    folder: Path
    shapes: list[LayerShape]
    dtype: torch.dtype
    sources: Mapping[str, Source] = field(default_factory=dict[str, Source])
    written: bool = False

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if the file's tensors are not those of the model that its fields describe.

        Args:
            expected: shape of each parameter.
        """
        tensors = {name: self.header.tensors[source.stored] for name, source in self.sources.items()}
        problems = {
            "missing": sorted(expected.keys() - tensors.keys()),
            "unexpected": sorted(self.sources[name].stored for name in tensors.keys() - expected.keys()),
            "wrong shape": [
                f"{self.sources[name].stored} {list(tensors[name].shape)} instead of {list(expected[name])}"
                for name in sorted(tensors.keys() & expected.keys())
                if tensors[name].shape != expected[name]
            ],
        }
        if any(problems.values()):
            told = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
            raise CheckpointError(f"{self.header.path} does not fit its own fields: {told}. Convert the model again.")

    def write(self) -> None:
        """Write the weights, once.

        Raises:
            ResourceError: if they do not fit.
        """
        if self.written:
            return
        size = sum(math.prod(self.header.tensors[one.stored].shape) for one in self.sources.values())
        needed, free = size * self.dtype.itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ResourceError(
                f"{self.header.path} needs {needed / 1e9:.1f} GB of temporary files once it is dequantised, and"
                f" {free / 1e9:.1f} GB are free. Free some, or set TMPDIR to a folder with more space."
            )
        self._say()
        shards = list(self._shards())
        names = [f"model-{at + 1:05}-of-{len(shards):05}.safetensors" for at in range(len(shards))]
        names = [SINGLE] if len(shards) == 1 else names
        with storage_errors(self.folder):
            for file, parameters in zip(names, shards, strict=True):
                tensors = {name: self._tensor(name) for name in parameters}
                save_file(tensors, self.folder / file, metadata={"format": "pt"})
            if len(shards) > 1:
                where = {name: file for file, parameters in zip(names, shards, strict=True) for name in parameters}
                write_json(self.folder / INDEX, {"metadata": {"total_size": needed}, "weight_map": where})
        self.written = True

    def _say(self) -> None:
        """What becomes of codes."""
        kinds = sorted({kind.name for one in self.sources.values() if (kind := self._stored(one).kind).block > 1})
        if kinds:
            log.warning(
                "%s: GGUF of %s: weights are dequantised to %s; quantising again rounds twice",
                self.header.path.name,
                ", ".join(kinds),
                str(self.dtype).removeprefix("torch."),
            )

    def _stored(self, source: Source) -> GgufTensor:
        return self.header.tensors[source.stored]

    def _shards(self) -> Iterator[list[str]]:
        """Names of the parameters that go into one file each."""
        shard: list[str] = []
        held = 0
        for name, source in self.sources.items():
            size = math.prod(self._stored(source).shape) * self.dtype.itemsize
            if shard and held + size > _SHARD_BYTES:
                yield shard
                shard, held = [], 0
            shard.append(name)
            held += size
        yield shard

    def _tensor(self, name: str) -> Tensor:
        """A parameter as transformers has it."""
        source = self.sources[name]
        stored = self._stored(source)
        shape = self.shapes[source.layer] if source.layer is not None else None
        heads = {"query": shape.query_heads, "kv": shape.kv_heads}.get(source.turned, 0) if shape else 0
        return as_numbers(self.header.path, stored, self.dtype, heads, source.offset)


def as_numbers(path: Path, stored: GgufTensor, dtype: torch.dtype, heads: int = 0, offset: float = 0.0) -> Tensor:
    """The numbers of a stored tensor.

    Args:
        path: the file.
        stored: the tensor.
        dtype: of the result.
        heads: if not 0, rows lie in pairs within so many heads, and come to lie in two halves of each.
        offset: what is taken from each number.

    Raises:
        CheckpointError: if the file has become shorter since its header was read.
    """
    width = stored.shape[-1] if len(stored.shape) > 1 else stored.kind.block
    rows = math.prod(stored.shape) // width
    try:
        raw = np.memmap(path, np.uint8, "r", stored.begin, (rows, width // stored.kind.block * stored.kind.bytes))
    except ValueError as error:
        raise CheckpointError(f"{path} has become shorter while it was read. Wait until it is whole.") from error
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1) if heads else None
    found = torch.empty((rows, width), dtype=dtype)
    step = max(1, _CHUNK // width)
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        part = raw[begin:end] if order is None else raw[order[begin:end]]
        numbers = dequantized(part, stored.kind)
        found[begin:end] = numbers - offset if offset else numbers
    return found.reshape(stored.shape)


_DESCRIBED: dict[tuple[str, int, int, int], GgufModel] = {}
"""What this process has described, by path, size, time and place of the file."""


def describe_gguf(path: Path) -> GgufModel:
    """Read a GGUF file's header, and write config and tokenizer into a temporary folder, once for each file.

    Raises:
        CheckpointError: if the file is damaged, or holds what is not read, named.
        ResourceError: if there is no place for temporary files.
    """
    real = path.resolve()
    about = real.stat()
    key = (str(real), about.st_size, about.st_mtime_ns, about.st_ino)
    known = _DESCRIBED.get(key)
    if known is None or not known.folder.is_dir():
        known = _DESCRIBED[key] = _described(path)
    return known


def _described(path: Path) -> GgufModel:
    """Header, checked, and its folder."""
    if _SPLIT.search(path.name):
        raise CheckpointError(
            f"{path} is one part of a split GGUF. Join them first: llama-gguf-split --merge {path.name} whole.gguf"
        )
    header = read_gguf_header(path)
    fields = Fields(header)
    if fields.integer("split.count", 0, whole=True) > 1:
        raise CheckpointError(f"{path} is one part of a split GGUF. Join them first: llama-gguf-split --merge.")
    if fields.text("general.type", "model", whole=True) != "model":
        raise fields.refuse(f"is no model but of type '{fields.text('general.type', whole=True)[:40]}'.")
    for name, tensor in header.tensors.items():
        if not tensor.kind.readable:
            raise fields.refuse(
                f"stores '{name[:80]}' as {tensor.kind.name}, which the gguf package does not dequantise. Give a file"
                " of another type, such as Q8_0."
            )
    dtype = _dtype(header)
    factors = header.tensors.get(FACTORS)
    values, shapes = config_of(
        fields,
        None if factors is None else as_numbers(path, factors, torch.float32),
        str(dtype).removeprefix("torch."),
    )
    sources = _sources(fields)
    if has_tokens(fields) and not fields.texts("tokenizer.ggml.tokens"):
        raise fields.refuse("has no tokenizer.ggml.tokens, which is needed. Convert the model to GGUF again.")
    folder = _scratch() / _name(path)
    with storage_errors(folder):
        folder.mkdir(parents=True)
        ids = special_ids(fields) if has_tokens(fields) else {}
        write_json(folder / "config.json", values | ids)
        if has_tokens(fields):
            write_json(folder / "generation_config.json", ids)
            write_tokenizer(fields, folder, values["vocab_size"], values["max_position_embeddings"])
        else:
            log.warning("%s: the file holds no tokenizer", path.name)
    return GgufModel(header, folder, shapes, dtype, sources)


def _sources(fields: Fields) -> dict[str, Source]:
    """Where each parameter comes from. Raises CheckpointError naming tensors that the architecture has not."""
    found = {name: parameter_of(name, fields.arch) for name in fields.header.tensors if name != FACTORS}
    if odd := sorted(name for name, one in found.items() if one is None):
        raise fields.refuse(f"holds tensors that {fields.arch} has not: {listed(odd)}.")
    return dict(sorted(one for one in found.values() if one is not None))


def _dtype(header: GgufHeader) -> torch.dtype:
    """The dtype of all weights: that of the matrices where they are floats, bfloat16 where they are codes."""
    kinds = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if kinds <= FLOATS.keys():
        return FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float32
    return torch.bfloat16


def _name(path: Path) -> str:
    """What the model is called: the file's name without its end."""
    return (path.stem if path.suffix.lower() == SUFFIX else path.name) or "model"


_KEPT: dict[int, Path] = {}
"""The temporary folder of each process, by its id: a forked child must not remove its parent's."""


def _scratch() -> Path:
    """A new folder inside this process's own."""
    kept = _KEPT.get(os.getpid())
    if kept is None or not kept.is_dir():
        kept = _KEPT[os.getpid()] = new_scratch()
        atexit.register(_remove, os.getpid(), kept)
    return kept / str(len(list(kept.iterdir())))


def _remove(process: int, folder: Path) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
