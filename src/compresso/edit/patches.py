"""The forward patches of a model: put on and taken off together, kept in records and files, and read back.

A line of records ("skip_in_prefill 2 5") is the form of release 0.1; kinds that have it keep it, as it says all of
them. Others are written as a name, params and names of tensors. Tensors lie in a folder of their own, not beside the
weights: engines read every safetensors file that they find there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compresso.edit import context_gates as context_gates  # registers its kind
from compresso.edit import prefill as prefill  # registers its kind
from compresso.edit import quantise_inputs as quantise_inputs  # registers its kind
from compresso.edit import round_inputs as round_inputs  # registers its kind
from compresso.edit import slice_stream as slice_stream  # registers its kind
from compresso.edit.patch import KINDS, Patch, kind_of, unknown
from compresso.errors import CheckpointError

TENSORS = "patches/tensors.safetensors"
"""Within the folder of a checkpoint; absent where no patch has tensors."""
Written = str | Mapping[str, Any]
"""A patch in records."""


def patch_(model: PreTrainedModel, patches: Sequence[Patch]) -> None:
    """Apply patches in order.

    Raises:
        ArchError: a patch does not fit the model, or is unknown; then nothing was changed.
    """
    for patch in patches:
        kind_of(patch)
    for patch in patches:
        patch.apply_(model)


def unpatch_(model: PreTrainedModel) -> None:
    """Compute as the weights alone say."""
    for kind in KINDS.values():
        kind.undo_(model)


def written(patches: Sequence[Patch]) -> list[Written]:
    """Patches as records hold them, their tensors left out. Raises ArchError for an unknown one."""
    return [_written(patch) for patch in patches]


def save_tensors(patches: Sequence[Patch], folder: Path) -> None:
    """Write the tensors of patches into the folder of a checkpoint; without any, nothing is written."""
    tensors = {f"{i}.{name}": tensor for i, patch in enumerate(patches) for name, tensor in patch.tensors.items()}
    if tensors:
        (folder / TENSORS).parent.mkdir(exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def records_of(folder: Path) -> list[Written]:
    """The patches that the records of a checkpoint name, for `read_patches`."""
    found: list[Written] = json.loads((folder / "records.json").read_text("utf-8")).get("patches", [])
    return found


def read_patches(records: Sequence[Written], folder: Path | None = None) -> tuple[Patch, ...]:
    """The patches that records name.

    Args:
        records: in the order of application, each a line or an object with name, params and tensors.
        folder: of the checkpoint, where some have tensors.

    Raises:
        ArchError: a patch is unknown.
        CheckpointError: a tensor is missing.
    """
    wanted = any(isinstance(one, Mapping) and one.get("tensors") for one in records)
    stored = _stored(folder) if wanted else {}
    return tuple(_read(one, i, stored) for i, one in enumerate(records))


def _written(patch: Patch) -> Written:
    kind = kind_of(patch)
    if kind.line is not None:
        return kind.line(patch)
    return {"name": patch.name, "params": dict(patch.params), "tensors": sorted(patch.tensors)}


def _read(one: Written, index: int, stored: Mapping[str, Tensor]) -> Patch:
    if isinstance(one, str):
        name, *words = one.split() or [""]
        kind = KINDS.get(name)
        patch = kind.read(words) if kind is not None and kind.read is not None else None
        if patch is None:
            raise unknown(one)
        return patch
    names = [str(name) for name in one.get("tensors", ())]
    if lacking := [name for name in names if f"{index}.{name}" not in stored]:
        raise CheckpointError(
            f"{TENSORS} has no '{index}.{lacking[0]}', which forward patch '{one.get('name')}' computes with; copy the"
            " whole folder"
        )
    patch = Patch(
        str(one.get("name")), dict(one.get("params", {})), {name: stored[f"{index}.{name}"] for name in names}
    )
    kind_of(patch)
    return patch


def _stored(folder: Path | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint's patches. Raises CheckpointError if the file is missing or damaged."""
    path = None if folder is None else folder / TENSORS
    if path is None or not path.is_file():
        raise CheckpointError(f"{TENSORS} is missing, which the forward patches compute with; copy the whole folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{TENSORS} is damaged ({error}); copy the folder again") from error
