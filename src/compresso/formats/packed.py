"""Writing rounded weights as codes of few bits, in the formats of compressed-tensors, for engines that read them.

`rtn`, `gptq`, `awq`, `smoothquant` and `qat`, and `besa` and `sparsegpt` with `bits`, leave values on a grid, stored as
full numbers. The grid can be told from the values, so any such checkpoint can be packed later, without the run that
made it. The library packs, unpacks and words the config.

Weights alone: pack-quantized. transformers 5.23 unpacks at the first forward pass, or at once where the config says so
(`dequantize`); it says so for asymmetric grids, since their packed zero points are not read the first way, and for
experts, which are stacked in memory (`formats/packed_experts.py`). The file is smaller, the model in memory and its
speed are not. Weights of 8 bits under rounded activations (`smoothquant`, `qat`):
int-quantized, for engines that multiply integers; transformers computes it with full numbers. The library's steps of
activations are 1/127.5 of the largest entry, those of `compresso.load` 1/127.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import new_folder, write_text
from compresso.core.rounding import recovered
from compresso.errors import ExportError
from compresso.formats.beside import write_beside
from compresso.formats.packed_card import TESTED, packed_card
from compresso.formats.packed_experts import as_written, check_experts, unstacked, written_linears
from compresso.formats.packing import Packing
from compresso.native import per_layer_auto_map, per_layer_file


def save_packed(
    model: PreTrainedModel,
    packing: Packing,
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
) -> None:
    """Write a checkpoint whose rounded linears are packed; `folder` is complete or untouched.

    Args:
        model: live, with weights on grids; of a class of ours where its layers differ, whose file goes beside them.
        packing: what was rounded, and how.
        tokenizer: written beside it.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.

    Raises ExportError if compressed-tensors is not installed, a weight lies on no such grid, or experts are not packed
    so (`check_experts`); CheckpointError if `folder` may not be written.
    """
    tied: dict[str, Any] = getattr(model, "_tied_weights_keys", None) or {}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name in tied)
    }
    stacks = {name: state.pop(name) for name in packing.linears if name in state}
    linears = {name: state.pop(f"{name}.weight") for name in packing.linears if name not in stacks}
    if stacks:
        check_experts(model, stacks, packing.symmetric, bool(packing.inputs))
        of_experts = {own: one for name, stack in stacks.items() for own, one in unstacked(model, name, stack).items()}
        linears = {**written_linears(model, linears), **of_experts}
        state = as_written(model, state)
    quantized = _config(packing, _whole(model, linears, state, stacks), at_once=bool(stacks))
    for name, weight in linears.items():
        state |= {f"{name}.{part}": tensor for part, tensor in _packed(name, weight, packing).items()}
    config = {**json.loads(model.config.to_json_string()), "quantization_config": quantized}
    config.pop("auto_map", None)  # of code that is not written here
    if auto_map := per_layer_auto_map(model.config.model_type):
        config["auto_map"] = auto_map
    with new_folder(folder, force) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        if (file := per_layer_file(model.config.model_type)) is not None:
            shutil.copyfile(file, temporary / file.name)
        write_beside(temporary, config, model, tokenizer, source)
        write_text(temporary / "README.md", packed_card(packing, source, model, len(linears)))
        if check is not None:
            check(temporary)


def _packed(name: str, weight: Tensor, packing: Packing) -> dict[str, Tensor]:
    """What is written of a linear's weight [out, in]: codes, scales [out, groups] and, of asymmetric grids, zero
    points.
    """
    bits = packing.bits
    grid = recovered(weight, bits, packing.group, symmetric=packing.symmetric)
    if grid is None:
        kind = "a symmetric" if packing.symmetric else "an asymmetric"
        raise ExportError(
            f"{name} does not lie on {kind} grid of {bits} bits in groups of {packing.group or 'a row'}; "
            "give the bits and group that it was rounded with"
        )
    middle = 2 ** (bits - 1)  # the library counts codes from here
    codes, scale = (grid.codes(weight.float()) - middle).to(torch.int8), grid.scale.to(weight.dtype)
    if packing.inputs:
        return {"weight": codes, "weight_scale": scale}
    helpers = _library("compressors.pack_quantized.helpers")
    packed: Tensor = helpers.pack_to_int32(codes, bits)
    if not torch.equal(helpers.unpack_from_int32(packed, bits, weight.shape), codes):
        raise ExportError(f"{name} does not unpack to what was packed; use compressed-tensors {TESTED}")
    found = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    if not packing.symmetric:
        found["weight_zero_point"] = helpers.pack_to_int32((grid.zero - middle).to(torch.int8), bits, packed_dim=0)
    return found


def _whole(
    model: nn.Module, linears: Mapping[str, Tensor], state: Mapping[str, Tensor], stacks: Mapping[str, Tensor]
) -> list[str]:
    """The linears that are not packed, under their written names; of a mixture its routers are among them."""
    if not stacks:
        return [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in linears]
    embeddings = {name for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    matrices = (name.removesuffix(".weight") for name, one in state.items() if one.dim() == 2)
    return [name for name in matrices if name not in embeddings]


def _config(packing: Packing, whole: list[str], at_once: bool) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    Args:
        packing: what is packed, and how.
        whole: linears that are not packed, which are listed as ignored.
        at_once: whether transformers has to unpack while it reads.
    """
    quantization = _library("quantization")
    group = packing.group
    weights = quantization.QuantizationArgs(
        num_bits=packing.bits,
        type="int",
        symmetric=packing.symmetric,
        strategy="group" if group else "channel",
        group_size=group or None,
    )
    inputs = packing.inputs and quantization.QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy=packing.inputs, dynamic=True
    )
    made = quantization.QuantizationConfig(
        config_groups={
            "group_0": quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        },
        format=packing.format,
        quantization_status="compressed",
        ignore=whole,
    )
    version = _library("version").__version__
    dequantize = {"dequantize": True} if at_once or not packing.symmetric else {}
    return {
        "quant_method": "compressed-tensors",
        "version": version,
        **made.model_dump(mode="json", exclude={"quant_method"}),
        **dequantize,
    }


def _library(part: str) -> Any:
    """A module of compressed-tensors. Raises ExportError if it is not installed."""
    try:
        return importlib.import_module(f"compressed_tensors.{part}")
    except ImportError as error:
        raise ExportError(f"packing needs compressed-tensors; pip install compressed-tensors=={TESTED}") from error
