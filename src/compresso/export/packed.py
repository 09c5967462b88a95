"""Writing rounded weights as codes of few bits, in the format of compressed-tensors (pack-quantized), for engines that read it.

`rtn`, `gptq` and `awq` leave values on a grid, stored as full numbers. A symmetric grid can be told from the values, so any
such checkpoint can be packed later, without the run that made it. The library packs, unpacks and words the config.

Symmetric grids only: of asymmetric ones transformers 5.23 with compressed-tensors 0.20 writes packed zero points that it cannot read again.
transformers unpacks at the first forward pass: the file is smaller, the model in memory and its speed are not.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import new_folder, write_text
from compresso.checkpoint.folder import read_json
from compresso.core.rounding import recovered
from compresso.errors import ExportError

TESTED = "0.20.0"


@dataclass(frozen=True)
class Packing:
    """What a run rounded: full names of the linears, and the bits and group of their grids."""

    linears: tuple[str, ...]
    bits: int
    group: int


def packing_of(folder: Path | None) -> Packing:
    """What can be packed of a folder that compresso wrote, by its records: what the last stage that rounded left.

    Raises ExportError, with the cure, if nothing can.
    """
    path = None if folder is None else folder / "records.json"
    records: dict[str, Any] = read_json(path) if path is not None and path.is_file() else {}
    stages: list[dict[str, Any]] = records.get("recipe", {}).get("stages", [])
    rounding = [(name, knobs) for one in stages for name, knobs in one.items() if knobs.get("bits")]
    if not rounding:
        raise ExportError("nothing in it was rounded by compresso, so there is nothing to pack; run rtn, gptq or awq on it first")
    name, knobs = rounding[-1]
    if not knobs.get("symmetric"):
        raise ExportError(
            f"its stage {name} rounded to asymmetric grids, which are not packed; run it with --set stages.{name}.symmetric=true"
        )
    linears = tuple(weight.removesuffix(".weight") for weight in records["stages"][name]["zeros"])
    return Packing(linears, int(knobs["bits"]), int(knobs.get("group") or 0))


def save_packed(
    model: PreTrainedModel,
    linears: Sequence[str],
    folder: Path | str,
    *,
    bits: int,
    group: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint whose rounded linears are packed; `folder` is complete or untouched.

    Args:
        model: live, of equal widths in all layers, with weights on symmetric grids.
        linears: full names of the rounded ones.
        bits, group: of their grids; group 0 is one scale a row.
        tokenizer: written beside it.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.

    Raises ExportError if compressed-tensors is not installed, or a weight lies on no such grid; CheckpointError if `folder` may not be
    written.
    """
    helpers = _library("compressors.pack_quantized.helpers")
    tied: dict[str, Any] = getattr(model, "_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if not (model.config.tie_word_embeddings and name in tied)}
    for name in linears:
        weight: Tensor = state.pop(f"{name}.weight")
        grid = recovered(weight, bits, group)
        if grid is None:
            raise ExportError(
                f"{name} does not lie on a symmetric grid of {bits} bits in groups of {group or 'a row'}; "
                "give the bits and group that it was rounded with, and round with symmetric: true"
            )
        codes = (grid.codes(weight.float()) - grid.zero[0, 0]).to(torch.int8)
        scale = grid.scale.to(weight.dtype)
        packed: Tensor = helpers.pack_to_int32(codes, bits)
        if not torch.equal(helpers.unpack_from_int32(packed, bits, weight.shape), codes):
            raise ExportError(f"{name} does not unpack to what was packed; use compressed-tensors {TESTED}")
        state |= {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(weight.shape),
        }
    config = {**json.loads(model.config.to_json_string()), "quantization_config": _config(model, linears, bits, group)}
    with new_folder(folder, force) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors", metadata={"format": "pt"})
        write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if check is not None:
            check(temporary)


def _config(model: nn.Module, linears: Sequence[str], bits: int, group: int) -> dict[str, Any]:
    """The entry `quantization_config` of config.json; linears that are not packed are listed as ignored."""
    quantization = _library("quantization")
    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group" if group else "channel", group_size=group or None
    )
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    made = quantization.QuantizationConfig(
        config_groups={"group_0": quantization.QuantizationScheme(targets=["Linear"], weights=args)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=whole,
    )
    version = _library("version").__version__
    return {"quant_method": "compressed-tensors", "version": version, **made.model_dump(mode="json", exclude={"quant_method"})}


def _library(part: str) -> Any:
    """A module of compressed-tensors. Raises ExportError if it is not installed."""
    try:
        return importlib.import_module(f"compressed_tensors.{part}")
    except ImportError as error:
        raise ExportError(f"packing needs compressed-tensors; pip install compressed-tensors=={TESTED}") from error
