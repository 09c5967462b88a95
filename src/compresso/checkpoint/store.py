"""Tensors that are read from disk when they are asked for, so that memory holds only those in use.

Bytes are read, not mapped: a mapped file counts as memory under a limit on address space or data, and a written-to page
stays. Headers were checked when the source was opened.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compresso.checkpoint.expert_pieces import Pieces
from compresso.checkpoint.header import TensorInfo, read_header
from compresso.checkpoint.source import Source
from compresso.errors import CheckpointError, NumericError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Store(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, in one dtype, on the CPU.

    Args:
        source: opened with its weights.
        names: of the tensors that are wanted; others are left alone.
        dtype: that every tensor is given in.
        tied: name -> the name under which its tensor is stored.
        pieces: of names that are stored otherwise: how.

    Raises:
        CheckpointError: the source has no weights.
    """

    def __init__(
        self,
        source: Source,
        names: Iterable[str],
        dtype: torch.dtype,
        tied: Mapping[str, str],
        pieces: Mapping[str, Pieces] | None = None,
    ) -> None:
        if source.folder is None or not source.tensors:
            raise CheckpointError(
                f"model {source.name} was opened without weights, and this needs them. Give its folder or hub name."
            )
        self.dtype = dtype
        self.pieces = dict(pieces or {})
        self._where: dict[str, tuple[Path, TensorInfo]] = {
            name: (source.folder / source.tensors[name].file, source.tensors[name])
            for name in names
            if name in source.tensors
        }
        self._apart = {
            one: (source.folder / source.tensors[one].file, source.tensors[one])
            for of in self.pieces.values()
            for one in of.names
        }
        self._rounded: dict[str, torch.dtype] = {}
        self._where |= {
            name: self._where[other] for name, other in tied.items() if name not in self._where and other in self._where
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises KeyError for one that is not stored, CheckpointError if its file has become shorter, NumericError if it
        holds NaN or Inf.
        """
        if name not in self._where and name in self.pieces:
            dtype = self._rounded.get(name, self.dtype)
            return self.pieces[name].joined(lambda one: self._read(one, self._apart[one]).to(dtype).to(self.dtype))
        tensor = self._read(name, self._where[name])
        return tensor.to(self._rounded.get(name, self.dtype)).to(self.dtype)

    def __contains__(self, name: object) -> bool:
        """Whether a tensor is stored; nothing is read."""
        return name in self._where or name in self.pieces

    def _read(self, name: str, where: tuple[Path, TensorInfo]) -> Tensor:
        """A stored tensor in its own dtype."""
        path, info = where
        content = bytearray(info.end - info.begin)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start + info.begin)
            if file.readinto(content) != len(content):
                raise CheckpointError(
                    f"{path.name} ends inside '{name}'; it was changed while it was read. Fetch or write it again"
                )
        if not content:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        tensor = torch.frombuffer(content, dtype=DTYPES[info.dtype]).reshape(info.shape)
        if not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
            raise NumericError(f"'{name}' holds NaN or Inf. Fetch the model again, or train it again.")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter({**self._where, **self.pieces})

    def __len__(self) -> int:
        return len({**self._where, **self.pieces})

    def round_as(self, stored: Mapping[str, TensorInfo]) -> None:
        """From now on give tensors rounded to the dtype that a checkpoint has them in."""
        self._rounded = {name: DTYPES[info.dtype] for name, info in stored.items() if name in self._where}
        self._rounded |= {
            name: DTYPES[stored[of.names[0]].dtype] for name, of in self.pieces.items() if of.names[0] in stored
        }

    def replace(self, file: Path) -> None:
        """From now on read the tensors that a safetensors file holds from there."""
        self._where |= {name: (file, info) for name, info in read_header(file).items()}
