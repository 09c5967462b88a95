"""Writing a checkpoint whose tensors do not fit into memory together: one file a block, under the names and dtypes they
came with.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.arch.outputs import outputs
from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.store import DTYPES
from compresso.errors import ExportError, NumericError
from compresso.formats.beside import write_beside
from compresso.native import per_layer_auto_map, per_layer_file
from compresso.sweep.offload import Offloaded

_GENERATION = "generation_config.json"


def save_offloaded(
    offloaded: Offloaded,
    source: Source,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Tensor,
    atol: float,
) -> tuple[Literal["uniform", "native"], float]:
    """Write the tensors of an offloaded model into an empty folder and open it again, offloaded too.

    Args:
        offloaded: the edited model; shapes are those of its source.
        source: what it came from: dtypes, config, and the layout they are in.
        folder: the new checkpoint's.
        tokenizer: written beside it.
        ids: what both are asked [1, seq].
        atol: largest difference of logits, in float32.

    Returns:
        The layout, and the difference.

    Raises ExportError if they differ by more, NumericError naming a tensor that is not finite once rounded to its
    stored dtype.
    """
    assert source.folder is not None  # the store was opened with it
    blocks = arch_for(offloaded.model.config).blocks(offloaded.model)
    own = {name for name in offloaded.store if name in source.tensors or name in offloaded.store.pieces}
    files = [[name for name in offloaded.of_block(block) if name in own] for block in blocks]
    inside = {name for names in files for name in names}
    files += [[name] for name in offloaded.store if name in own and name not in inside]  # each may be the largest
    files += [[name] for name in offloaded.buffers]
    where: dict[str, str] = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = dict(one for name in names for one in _pieces(name, offloaded, source))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    total = sum(source.tensors[name].end - source.tensors[name].begin for name in where)
    write_text(
        folder / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n",
    )
    if (source.folder / _GENERATION).is_file():
        shutil.copyfile(source.folder / _GENERATION, folder / _GENERATION)
    model_type = source.config.model_type
    config = {key: value for key, value in read_json(source.config_file).items() if key != "auto_map"}
    layout: Literal["uniform", "native"] = "uniform"
    if (file := per_layer_file(model_type)) is not None:  # ours, whatever lies beside the source
        shutil.copyfile(file, folder / file.name)
        config["auto_map"], layout = per_layer_auto_map(model_type), "native"
    write_beside(folder, config, offloaded.model, tokenizer, source.folder)
    return layout, _compared(offloaded, folder, ids, atol)


def _pieces(name: str, offloaded: Offloaded, source: Source) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a parameter or buffer, by the names that the source has."""
    whole = offloaded.buffers[name] if name in offloaded.buffers else offloaded.store[name]
    pieces = offloaded.store.pieces.get(name)
    for own, piece in [(name, whole)] if pieces is None else pieces.split(whole):
        stored = _stored(own, piece, source)
        yield own, stored.clone() if pieces is not None and stored.data_ptr() == piece.data_ptr() else stored


def _stored(name: str, tensor: Tensor, source: Source) -> Tensor:
    stored = tensor.to(DTYPES[source.tensors[name].dtype])
    if stored.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(stored)):
        raise NumericError(f"'{name}' holds NaN or Inf in {source.tensors[name].dtype} and is not written.")
    return stored.contiguous()


@torch.no_grad()
def _compared(offloaded: Offloaded, folder: Path, ids: Tensor, atol: float) -> float:
    """The largest difference between the logits of the live weights, rounded as they are stored, and those of the
    folder.
    """
    again = Offloaded(open_source(folder), offloaded.store.dtype, offloaded.device)
    found: list[Tensor] = []
    offloaded.store.round_as(open_source(folder).tensors)
    for one in (offloaded, again):
        with one.whole():
            found.append(outputs(one.model, ids.to(one.device)).float())
    difference = float((found[0] - found[1]).abs().max())
    if not difference <= atol:
        raise ExportError(
            f"logits of {folder.name} differ by {difference:.3g} from the live model's; wanted at most {atol:g}"
        )
    return difference
