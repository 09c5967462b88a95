"""Reading a model's weights. Gaps are never filled with random numbers."""

import copy
import logging
import math

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.checkpoint.code import refuse_code
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.meta import as_written
from compresso.checkpoint.reasons import reason_of
from compresso.checkpoint.source import Source
from compresso.checkpoint.tensors import is_packed, listed
from compresso.edit.stock import as_stock
from compresso.errors import CheckpointError, NumericError, ResourceError

log = logging.getLogger(__name__)


def meta_model(source: Source) -> PreTrainedModel:
    """The model's modules on the meta device, as its family's stock class: names and shapes without memory.

    Raises:
        ArchError: it is of no kind that is opened.
        CheckpointError: its config asks for the impossible.
    """
    return as_stock(as_written(source.config, source.config_file))


def load_model(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Read the weights (in the stored dtype unless one is given) and return the model in eval mode.

    Raises:
        CheckpointError: there are no weights or they do not fill the model exactly.
        NumericError: naming a tensor with NaN or Inf.
        ResourceError: memory does not suffice.
    """
    if source.folder is None or not source.tensors:
        raise CheckpointError(
            f"model {source.name} was opened without weights, and this needs them. Give its folder or hub name."
        )
    refuse_code(source.folder)  # once more, as the folder may have changed since it was opened
    try:
        model, info = auto_class(source.config).from_pretrained(  # a pair, as asked for
            source.folder,
            config=_unpacking(source.config),
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        if gaps := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
            raise CheckpointError(f"model {source.name} lacks weights for {listed(gaps)}. Fetch or write it again.")
        for name, tensor in model.state_dict().items():
            if (
                tensor.is_floating_point()
                and tensor.numel()
                and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
            ):
                raise NumericError(
                    f"model {source.name}: '{name}' holds NaN or Inf. Fetch the model again, or train it again."
                )
        if is_packed(source.config):
            log.warning(
                "%s: its packed weights were unpacked, so it runs, and takes memory, as a dense model", source.name
            )
            _as_dense_(model)
        return model.to(device)
    except ImportError as error:
        raise CheckpointError(f"model {source.name} is not opened without a package: {reason_of(error)}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            f"model {source.name} does not fit into memory of {device}. Use a smaller model or --device cpu."
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"model {source.name} cannot be loaded: {reason_of(error)}") from error


def numbers_of(source: Source) -> int:
    """How many numbers a model has in memory; of packed weights, once they are unpacked."""
    if is_packed(source.config):
        return sum(parameter.numel() for parameter in meta_model(source).parameters())
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def _unpacking(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config; of packed weights, one by which they are read as plain numbers."""
    copied = copy.deepcopy(config)
    if is_packed(config):
        copied.quantization_config = {**config.quantization_config, "dequantize": True}  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def _as_dense_(model: PreTrainedModel) -> None:
    """Let a model whose weights were unpacked say no more that they are packed: it is moved and cast as any other."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_pre_quantization_dtype")),
    ):
        for name in names:
            vars(owner).pop(name, None)
