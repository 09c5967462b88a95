"""Writing a shrunk model as a Hugging Face checkpoint: safetensors, a config that tells the truth, tokenizer, and what
the caller adds.

Three layouts. uniform: a plain transformers config, every engine opens it, all layers must have the same widths.
padded: plain too, layers zero-padded to the widest, the same function and no gain in size; of dense families alone.
native: each layer its own widths, opened after `import compresso` or with `trust_remote_code`, as the modelling file
lies beside the weights.
"""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import LayerShape
from compresso.checkpoint.atomic import new_folder, write_text
from compresso.edit.patch import Patch
from compresso.edit.patches import written
from compresso.errors import ExportError, NumericError
from compresso.formats.beside import write_beside
from compresso.formats.layout import (
    Layout,
    native_config,
    stock_config,
    stock_obstacle,
    uniform_obstacle,
    widest,
    with_one_epsilon,
)
from compresso.formats.native_moe import mixture_config, mixture_tensors
from compresso.formats.native_segformer import as_unequal
from compresso.formats.pad import pad_tensors
from compresso.formats.patched import save_patches
from compresso.formats.plain import check_plain, plain_obstacle, staged_obstacle
from compresso.formats.reopen import reopen_and_compare
from compresso.formats.shrunk import Shrunk, describe
from compresso.native import (
    MODELING_FILE,
    MOE_FILE,
    PYRAMID_FILE,
    SEGFORMER_FILE,
    family_of,
    mixture_family_of,
    pyramid_auto_map,
    segformer_auto_map,
    staged_family_of,
)

__all__ = ["Layout", "choose_layout", "reopen_and_compare", "save_checkpoint"]
RECORDS = "records.json"
"""Where `compresso.load` finds the names of patches."""


def save_checkpoint(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    folder: Path | str,
    layout: Layout | Literal["auto"] = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    source: Path | None = None,
    patches: Sequence[Patch] = (),
) -> Layout:
    """Write a shrunk model so that `folder` is complete or untouched, and return the layout used.

    Args:
        model: live model with stock parameter names and per-layer widths; an absent sub-layer has no parameters.
        shapes: widths of each layer; 0 for an absent sub-layer.
        layout: "auto" takes uniform where it can hold the model, else native.
        dtype: dtype to store; None keeps that of the model.
        files: further text files, name -> text (recipe.yaml, README.md, ...).
        force: replace a folder that is not empty.
        source: the folder that the model came from; what it holds beside weights and config is carried over.
        patches: what the model computes beside its weights, for `compresso.load`; a run's records name them already.

    Raises ExportError if the layout cannot hold the shapes, NumericError if a tensor is not finite (also after rounding
    to `dtype`), CheckpointError if `folder` may not be written, ResourceError if it does not fit.
    """
    texts = {**(files or {}), **({RECORDS: _records(patches)} if patches else {})}
    if _has_unequal_layers(model, layout):
        _write_plain(as_unequal(model), folder, tokenizer, dtype, texts, force, max_shard_size, source, patches)
        return "native"
    if family_of(model.config.model_type) is None and not _is_native_mixture(model, shapes, layout):
        check_plain(model, shapes, layout)
        _write_plain(model, folder, tokenizer, dtype, texts, force, max_shard_size, source, patches)
        return "uniform"
    if family_of(model.config.model_type) is None:
        layout, file, config, tensors = "native", MOE_FILE, mixture_config(model, shapes), mixture_tensors(model)
        tensors = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    else:
        described = describe(model, shapes)
        layout, file = choose_layout(described, layout), MODELING_FILE
        config, tensors = _lay_out(described, layout)
        tensors = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
        _check_complete(config, tensors, described.tied)
    config.dtype = dtype or model.dtype
    with new_folder(folder, force) as temporary:
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size, metadata={"format": "pt"})
        if layout == "native":
            shutil.copyfile(file, temporary / file.name)
        write_beside(temporary, config, model, tokenizer, source)
        _add_files(temporary, texts)
        save_patches(patches, temporary)
    return layout


def _is_native_mixture(model: PreTrainedModel, shapes: Sequence[LayerShape], layout: Layout | Literal["auto"]) -> bool:
    """Whether a model is written in our classes of mixtures of experts: asked for, or the only ones that hold it."""
    if mixture_family_of(model.config.model_type) is None:
        return False
    return layout == "native" or (layout == "auto" and plain_obstacle(model, shapes) is not None)


def _has_unequal_layers(model: PreTrainedModel, layout: Layout | Literal["auto"]) -> bool:
    """Whether a model of stages is written in our class of unequal layers: asked for, or the only one that holds it."""
    kind = model.config.model_type
    if staged_family_of(kind) is None:
        return False
    return layout == "native" or (layout == "auto" and staged_obstacle(model) is not None)


def _write_plain(
    model: PreTrainedModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    files: Mapping[str, str],
    force: bool,
    max_shard_size: int | str,
    source: Path | None,
    patches: Sequence[Patch],
) -> None:
    """Write a model that its own class and config hold, under the tensor names that its class writes."""
    tensors = {name: _stored(name, tensor.detach(), dtype) for name, tensor in model.state_dict(keep_vars=True).items()}
    with new_folder(folder, force) as temporary:
        model.save_pretrained(temporary, state_dict=tensors, max_shard_size=max_shard_size)
        config = copy.deepcopy(model.config)
        vars(config).pop("auto_map", None)  # of code that is not written here
        config.architectures, config.dtype = [type(model).__name__], dtype or model.dtype
        for file, auto_map in (
            (PYRAMID_FILE, pyramid_auto_map(config.model_type)),
            (SEGFORMER_FILE, segformer_auto_map(config.model_type)),
        ):
            if auto_map:
                config.auto_map = auto_map
                shutil.copyfile(file, temporary / file.name)
        write_beside(temporary, config, model, tokenizer, source)
        _add_files(temporary, files)
        save_patches(patches, temporary)


def _records(patches: Sequence[Patch]) -> str:
    """The part of a run's records that says what is computed beside the weights."""
    return json.dumps({"patches": written(patches)}, indent=2) + "\n"


def _add_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write further text files. Raises ExportError for a name that is not plain or taken."""
    for name, text in files.items():
        if Path(name).name != name or (folder / name).exists():
            raise ExportError(f"further file '{name}' must have a plain name that the checkpoint does not use itself.")
        write_text(folder / name, text)


def choose_layout(model: Shrunk, layout: Layout | Literal["auto"]) -> Layout:
    """The layout to write. Raises ExportError naming the first obstacle and the layouts that would do."""
    obstacle = uniform_obstacle(model)
    if layout == "auto":
        return "native" if obstacle else "uniform"
    if layout == "uniform" and obstacle:
        others = (
            "native"
            if stock_obstacle(model, widest(model))
            else "native (real widths) or padded (any engine, no smaller)"
        )
        raise ExportError(f"layout uniform cannot hold this model: {obstacle}. Use layout {others}.")
    if layout == "padded" and (obstacle := stock_obstacle(model, widest(model))):
        raise ExportError(f"layout padded cannot hold this model: {obstacle}. Use layout native.")
    if layout not in ("uniform", "padded", "native"):
        raise ExportError(f"unknown layout '{layout}'; known: auto, uniform, padded, native.")
    return layout


def _lay_out(model: Shrunk, layout: Layout) -> tuple[PreTrainedConfig, Mapping[str, Tensor]]:
    """Config and tensors of a layout that can hold the model."""
    if layout == "native":
        return native_config(model), model.tensors
    model = with_one_epsilon(model)
    wide = widest(model)
    config = stock_config(model, wide)
    if layout == "uniform":
        return config, model.tensors
    return config, pad_tensors(model.tensors, _expected(config, model.tied), model.shapes, wide, model.head_dim)


def _expected(config: PreTrainedConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a reader of this config will look for, from the meta device."""
    with torch.device("meta"):
        reader = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    return {
        name: tuple(tensor.shape)
        for name, tensor in reader.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def _check_complete(config: PreTrainedConfig, tensors: Mapping[str, Tensor], tied: bool) -> None:
    """Raise ExportError if a reader of the config would miss a tensor, find one too many or of another shape."""
    expected = _expected(config, tied)
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(name for name in expected.keys() | have.keys() if expected.get(name) != have.get(name)):
        told = ", ".join(
            f"{name} is {have.get(name, 'absent')}, wanted {expected.get(name, 'none')}" for name in odd[:4]
        )
        raise ExportError(
            f"the model does not have its architecture's tensors: {told}. Merge adapters, and shrink by a plan."
        )


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as it goes to disk: its dtype, contiguous, with a storage of its own. Raises NumericError if it is not
    finite.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if (
        tensor.is_floating_point()
        and tensor.numel()
        and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
    ):
        raise NumericError(
            f"'{name}' holds NaN or Inf in {str(tensor.dtype).removeprefix('torch.')} and is not written."
        )
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
