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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import new_folder, write_text
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.overwrite import PACKED_MARK
from compresso.core.rounding import recovered
from compresso.edit.round_inputs import Range, range_of
from compresso.errors import ExportError
from compresso.formats.beside import write_beside
from compresso.formats.config_text import config_text, older_obstacle, readers
from compresso.formats.packed_experts import as_written, check_experts, unstacked, written_linears
from compresso.native import per_layer_auto_map, per_layer_file

TESTED = "0.20.0"
_MOST = 8
ROUNDING = "awq, gptq, qat, rtn, smoothquant, besa with bits, sparsegpt with bits"
"""The stages that round, with what some of them want for it."""


@dataclass(frozen=True)
class Packing:
    """What a run rounded.

    Args:
        linears: full names.
        bits, group, symmetric: of their grids; group 0 is one scale a row.
        inputs: what shares a scale of the activations that they round, None if they round none.
        simulated: bits of activations that were rounded, and that the format does not have; None if there are none.
    """

    linears: tuple[str, ...]
    bits: int
    group: int = 0
    symmetric: bool = True
    inputs: Range | None = None
    simulated: int | None = None

    @property
    def kind(self) -> str:
        """In words, such as "4 bits, groups of 128, asymmetric"."""
        shared = f"groups of {self.group}" if self.group else "a scale a row"
        return (
            f"{self.bits} bits, {shared}"
            + ("" if self.symmetric else ", asymmetric")
            + (", activations of 8 bits" if self.inputs else "")
        )

    @property
    def format(self) -> str:
        """What the library calls it."""
        return "int-quantized" if self.inputs else "pack-quantized"


def packing_of(folder: Path | None) -> Packing:
    """What can be packed of a folder that compresso wrote, by its records: what the last stage that rounded left.

    Raises ExportError, with the cure, if nothing can.
    """
    path = None if folder is None else folder / "records.json"
    records: dict[str, Any] = read_json(path) if path is not None and path.is_file() else {}
    stages: list[dict[str, Any]] = records.get("recipe", {}).get("stages", [])
    rounding = [
        (name, knobs) for one in stages for name, knobs in one.items() if knobs.get("bits") or name in _OWN_WORDS
    ]
    if not rounding:
        raise ExportError(
            f"nothing in it was rounded by compresso, so there is nothing to pack; run one of {ROUNDING} on it first"
        )
    name, knobs = rounding[-1]
    linears = tuple(weight.removesuffix(".weight") for weight in records["stages"][name]["zeros"])
    if name in _OWN_WORDS:
        return _OWN_WORDS[name](linears, knobs, records["stages"][name])
    group = records["stages"][name].get("group", knobs.get("group"))  # what fitted, where that was another
    return Packing(linears, int(knobs["bits"]), int(group or 0), bool(knobs.get("symmetric")))


def _smoothquant(linears: tuple[str, ...], knobs: dict[str, Any], facts: dict[str, Any]) -> Packing:
    return Packing(linears, 8, inputs=range_of(knobs["inputs"]))


def _qat(linears: tuple[str, ...], knobs: dict[str, Any], facts: dict[str, Any]) -> Packing:
    """Binary and ternary rows take 2 bits; activations go with the weights if a grid of the format is theirs. Raises
    ExportError if weights were not rounded.
    """
    bits = int(knobs["weight_bits"])
    if bits > _MOST:
        raise ExportError(f"qat rounded no weights (weight_bits={bits}), so there is nothing to pack; give it 1 to 8")
    as_integers = bits == knobs["input_bits"] == 8 and knobs["inputs"] == "token" and not facts["asymmetric_inputs"]
    rounded = None if knobs["input_bits"] > _MOST else int(knobs["input_bits"])
    symmetric, inputs = bool(knobs["weight_symmetric"]), range_of("token") if as_integers else None
    return Packing(linears, max(bits, 2), 0, symmetric, inputs, None if as_integers else rounded)


_OWN_WORDS = {"smoothquant": _smoothquant, "qat": _qat}
"""Stages whose knobs say otherwise than by `bits` and `group` what they rounded."""


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
        write_text(temporary / "README.md", _card(packing, source, model, len(linears)))
        if check is not None:
            check(temporary)


def _card(packing: Packing, source: Path | None, model: PreTrainedModel, count: int) -> str:
    """README.md: what the folder holds, what opens it, and where the rest is told."""
    name = "" if source is None else " of `" + " ".join(source.resolve().name.replace("`", "'").split()) + "`"
    told = (
        "How it was made and what it can do stands in the README.md, recipe.yaml and records.json of the folder that it"
        " was exported from."
    )
    opens = auto_class(model.config).__name__
    file = per_layer_file(model.config.model_type)
    own = file and f"Layers differ, which {file.name} beside the weights computes: pass trust_remote_code=True to the"
    beside = f"{own} model's `from_pretrained`, or import compresso before.\n\n" if own else ""
    left_out = (
        f"Activations of {packing.simulated} bits, which it was trained for, are simulated by `compresso.load` of that"
        " folder and not in these files."
        if packing.simulated
        else ""
    )
    return f"""---
library_name: transformers
tags:
- compresso
- compressed-tensors
---

# Packed weights{name}

{count} linears that compresso {PACKED_MARK} compressed-tensors
({packing.format}): {packing.kind}. The values are those of the model that it was exported from. {told}
{left_out}

## How to load it

```bash
pip install transformers compressed-tensors=={TESTED}
```

```python
from transformers import {opens}, AutoTokenizer

model = {opens}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{beside}{_readers(packing, json.loads(config_text(model.config)))} Where it computes with full numbers, the file is
smaller; the model in memory and its speed are not.

## Limits

The licence and terms of the original model apply.
"""


def _readers(packing: Packing, config: dict[str, Any]) -> str:
    """What versions of transformers make of packed weights, as tried with 5.23 and 4.57.3."""
    if older_obstacle(config) is not None:
        return readers(config) + " It computes with full numbers."
    if not packing.symmetric:
        return "transformers 5 opens it and computes with full numbers; 4.57 does not unpack its zero points."
    if packing.inputs:
        return "transformers 5 opens it and computes with full numbers; 4.57 opens it and rounds activations."
    return readers(config) + " Both compute with full numbers."


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
