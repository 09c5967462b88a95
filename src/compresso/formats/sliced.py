"""Writing a model whose stream `slicegpt` cut as the narrower model that it stands for.

The run's folder holds the dense weights and the bases that its forward pass cuts the stream to. From both this makes,
matrix by matrix in float64, the weights of the narrower one (SliceGPT, arXiv 2401.15024, sections 3.1 to 3.3): gains
and shifts of norms go into the linears behind them, what writes to the stream of a LayerNorm model loses its mean, and
all is written in the bases. It opens in transformers, through a modelling file of ours
(`native/modeling_compresso_sliced.py`); no other engine's format has shortcuts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import arch_for
from compresso.arch.sliceable import Half, sliceable
from compresso.checkpoint.folder import read_json
from compresso.core.slicing import without_mean
from compresso.edit.patch import Patch
from compresso.edit.patches import read_patches
from compresso.edit.slice_stream import PATCH, sliced_by
from compresso.errors import ExportError
from compresso.formats.own_class import how_to_load, name_of, own_config, save_own
from compresso.native import SLICED_CLASSES, SLICED_FILE


def is_cut(folder: Path | None) -> bool:
    """Whether a folder's weights are to be computed with a cut stream, by the records of a run that wrote it."""
    return any(isinstance(one, dict) and one.get("name") == PATCH for one in _records(folder).get("patches", ()))


def slicing_of(folder: Path | None) -> Patch:
    """The cut of the stream that a folder's records name.

    Raises ExportError, with the cure, if there is none, or something that a rotation undoes is there too.
    """
    records = _records(folder)
    if not is_cut(folder):
        raise ExportError("slicegpt cut nothing in it, so there is nothing to slice; run slicegpt on it first")
    patches = read_patches(records["patches"], folder)
    if others := [patch.name for patch in patches if patch.name != PATCH]:
        raise ExportError(f"forward patch '{others[0]}' is no part of a sliced model; run slicegpt without it")
    for name, facts in records.get("stages", {}).items():
        if facts.get("bits") or facts.get("sparsity"):
            done = "rounded" if facts.get("bits") else "zeroed"
            raise ExportError(
                f"{name} {done} its weights, which a rotation undoes; leave {name} out of slicegpt's recipe"
            )
    found = sliced_by(patches)
    assert found is not None
    return found


def refuse_cut(folder: Path | None, form: str) -> None:
    """Raise ExportError if a folder's stream is cut, which the form does not hold: it would be the dense model's."""
    if is_cut(folder):
        raise ExportError(
            f"its stream is cut by slicegpt, which {form} does not hold: what it would write is the dense model. Export"
            " it as sliced, which transformers opens"
        )


def sliced_tensors(model: PreTrainedModel, patch: Patch) -> dict[str, Tensor]:
    """The weights of the narrower model, by the names of its class, in the model's dtype.

    Args:
        model: live, of a stock class, with its dense weights.
        patch: the cut of its stream.

    Raises ArchError: its stream cannot be sliced.
    """
    arch = arch_for(model.config)
    family, dtype = sliceable(model, arch), model.dtype
    centred = without_mean if family.layer_norm else (lambda rows: rows)
    device = model.device
    bases = [*patch.tensors["bases"].to(device).double(), patch.tensors["head"].to(device).double()]
    found: dict[str, Tensor] = {}
    for name in family.embeddings:
        table = model.get_parameter(f"{name}.weight").detach().double()
        found[f"{name}.weight"] = (centred(table) @ bases[0]).to(dtype)
    for i, block in enumerate(arch.blocks(model)):
        where, touched = f"{family.layers}.{i}", set[str]()
        for number, half in enumerate(family.halves):
            here, behind = bases[2 * i + number], bases[2 * i + number + 1]
            made = _half(block, half, here, behind, centred)
            made[f"{('attention', 'mlp')[number]}_shortcut.weight"] = behind.T @ here
            found |= {f"{where}.{name}": tensor.to(dtype) for name, tensor in made.items()}
            touched |= {half.norm, half.write, *half.reads}
        found |= {
            f"{where}.{name}": parameter.detach()
            for name, parameter in block.named_parameters()
            if name.rpartition(".")[0] not in touched
        }
    head = model.get_parameter("lm_head.weight").detach().double()
    gain, shift = _norm(model.get_submodule(family.final_norm))
    found["lm_head.weight"] = ((head * gain) @ bases[-1]).to(dtype)
    if shift is not None:
        found["lm_head.bias"] = (head @ shift).to(dtype)
    return found


def save_sliced(
    model: PreTrainedModel,
    patch: Patch,
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
) -> str:
    """Write the narrower model; `folder` is complete or untouched.

    Args:
        model: live, of a stock class, in the dtype that is written.
        patch: the cut of its stream.
        tokenizer, force, check, source: see `compresso.formats.own_class.save_own`.

    Returns:
        The model type that it gets.

    Raises:
        ArchError: its stream cannot be sliced.
        CheckpointError: `folder` may not be written.
    """
    tensors, config = sliced_tensors(model, patch), _config(model, patch)
    width = patch.tensors["bases"].shape[2]
    card = _card(model, tensors, width, source)
    save_own(
        folder,
        config,
        tensors,
        SLICED_FILE,
        card,
        model,
        tokenizer=tokenizer,
        force=force,
        check=check,
        source=source,
    )
    return str(config.model_type)


def sliced_model(model: PreTrainedModel, patch: Patch) -> PreTrainedModel:
    """The narrower model, live, with weights rounded to the model's dtype and computing in float32; arguments as in
    `save_sliced`.
    """
    config = _config(model, patch)
    _, language_model = SLICED_CLASSES[model.config.model_type]
    with torch.device("meta"):
        made = language_model(config)
    tensors = {name: tensor.float() for name, tensor in sliced_tensors(model, patch).items()}
    made.load_state_dict(tensors, assign=True)
    for name in [name for name, _ in made.named_modules()]:
        if name.endswith("rotary_emb"):  # its tables are no weights, so that they are still on the meta device
            made.set_submodule(name, model.get_submodule(name))
    return made.eval()


def _config(model: PreTrainedModel, patch: Patch) -> PreTrainedConfig:
    """The config of the narrower model."""
    config_class, language_model = SLICED_CLASSES[model.config.model_type]
    width, head = patch.tensors["bases"].shape[2], patch.tensors["head"].shape[1]
    return own_config(
        model,
        config_class,
        language_model,
        SLICED_FILE,
        stream_width=width,
        head_width=head,
        tie_word_embeddings=False,
    )


def _half(
    block: nn.Module, half: Half, here: Tensor, behind: Tensor, centred: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The weights of an attention or FFN between two bases, float64, by names relative to the layer."""
    gain, shift = _norm(block.get_submodule(half.norm))
    found: dict[str, Tensor] = {}
    for name in half.reads:
        linear = block.get_submodule(name)
        weight, bias = _linear(linear)
        found[f"{name}.weight"] = _as_stored(linear, (weight * gain) @ here)
        if bias is not None:
            found[f"{name}.bias"] = bias if shift is None else bias + weight @ shift
    linear = block.get_submodule(half.write)
    weight, bias = _linear(linear)
    found[f"{half.write}.weight"] = _as_stored(linear, behind.T @ centred(weight.T).T)
    if bias is not None:
        found[f"{half.write}.bias"] = behind.T @ centred(bias)
    return found


def _norm(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Gain and shift of a norm, float64."""
    bias = getattr(norm, "bias", None)
    return norm.get_parameter("weight").detach().double(), None if bias is None else bias.detach().double()


def _linear(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear, float64."""
    weight = linear.get_parameter("weight").detach().double()
    bias = getattr(linear, "bias", None)
    return weight.T if isinstance(linear, Conv1D) else weight, None if bias is None else bias.detach().double()


def _as_stored(linear: nn.Module, weight: Tensor) -> Tensor:
    """A weight [out, in] as its class holds it."""
    return weight.T if isinstance(linear, Conv1D) else weight


def _records(folder: Path | None) -> dict[str, Any]:
    """The records of a run that wrote the folder, or nothing."""
    path = None if folder is None else folder / "records.json"
    return read_json(path) if path is not None and path.is_file() else {}


def _card(model: PreTrainedModel, tensors: dict[str, Tensor], width: int, source: Path | None) -> str:
    """README.md: what the folder holds, what opens it, and where the rest is told."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    numbers = sum(tensor.numel() for tensor in tensors.values())
    shortcuts = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_shortcut.weight"))
    tied = " The head was tied to the embedding and is one of its own now." if model.config.tie_word_embeddings else ""
    grown = "" if numbers < dense else " It is LARGER than the dense model."
    return f"""---
library_name: transformers
tags:
- compresso
---

# Sliced weights{name_of(source)}

A model whose residual stream compresso (`pip install compresso-llm`) cut from {model.config.hidden_size:,} dimensions
to {width:,}. All parameters: {numbers:,} in place of {dense:,}, {shortcuts:,} of them in shortcuts, which rotate the
stream from one half of a layer to the next.{tied}{grown} What it computes is what the folder that it was exported from
computes in `compresso.load`, but for rounding. How that was made and what it can do stands in its README.md,
recipe.yaml and records.json.

{how_to_load(SLICED_FILE)} llama.cpp, ONNX Runtime, OpenVINO and vLLM have no shortcuts, and cannot serve it.

## Limits

Fewer numbers are not less time by themselves: shortcuts are further multiplications. Measure first. Keys and values
take as much memory as those of the dense model. The licence and terms of the original model apply.
"""
