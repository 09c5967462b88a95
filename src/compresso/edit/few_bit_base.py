"""Base weights in 8 or 4 bits while adapters learn on them, through bitsandbytes (LLM.int8, Dettmers et al., arXiv
2208.07339; NF4, QLoRA, arXiv 2305.14314).

The linears of the blocks are rounded where they lie and wait, as stored, on the CPU; what learns sees the rounded
ones. Behind training they come back, so that adapters are merged into the stored weights and the result has no
rounding. Departure from QLoRA: scales are not rounded a second time, and there is no paged optimizer.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.errors import RecipeError, quoted

FewBits = Literal["int8", "nf4"]
OUTLIERS = 6.0
"""Activations beyond this are multiplied in 16 bits, as published; on a GPU, of int8."""


def library() -> Any:
    """bitsandbytes. Raises RecipeError if it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise RecipeError(
            "a base in 8 or 4 bits takes bitsandbytes, which is not installed; pip install 'compresso-llm[bits]', or"
            " leave base out"
        ) from error
    except (OSError, RuntimeError) as error:
        said = quoted(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__, 200)
        raise RecipeError(f"a base in 8 or 4 bits takes bitsandbytes, which does not start: {said}") from error


def linears_of_blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that would be rounded, by their names in the model; stacked experts are none."""
    blocks = {id(module) for block in arch_for(model.config).blocks(model) for module in block.modules()}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and id(module) in blocks:
            yield name, module


def round_base_(model: PreTrainedModel, to: FewBits) -> dict[str, nn.Linear]:
    """Round the linears of the blocks in place.

    Args:
        model: its weights are of any float dtype; computed is in the dtype of the activations.
        to: "int8", rows with a scale each, or "nf4", blocks of 64 with a scale each.

    Returns:
        The linears as they were, on the CPU, for `restore_base_`.

    Raises:
        RecipeError: bitsandbytes is not installed, or the blocks have no linears.
    """
    bnb = library()
    held: dict[str, nn.Linear] = {}
    for name, linear in list(linears_of_blocks(model)):
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, _rounded(bnb, linear, to))
        held[name] = linear.cpu()
    if not held:
        raise no_linears(model, to)
    return held


def no_linears(model: PreTrainedModel, to: str) -> RecipeError:
    """The refusal of a model whose blocks have no linears."""
    return RecipeError(
        f"base: {to} rounds the linears of blocks, and those of a {model.config.model_type} are none that bitsandbytes"
        " rounds; leave base out"
    )


def restore_base_(adapted: PeftModel, held: Mapping[str, nn.Linear]) -> None:
    """Put back what `round_base_` returned, under adapters where there are some, in place."""
    model = adapted.get_base_model()
    for name, linear in held.items():
        module = model.get_submodule(name)
        owner, _, own = name.rpartition(".")
        if isinstance(module, LoraLayer):
            module.base_layer = linear.to(_device(module.base_layer))
        else:
            setattr(model.get_submodule(owner), own, linear.to(_device(module)))


def _rounded(bnb: Any, linear: nn.Linear, to: FewBits) -> nn.Module:
    """The linear in few bits, on its device."""
    weight, size = linear.weight.detach(), (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        if to == "nf4":
            small = bnb.nn.Linear4bit(*size, quant_type="nf4", compress_statistics=False)
        else:
            small = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=OUTLIERS)
    if to == "nf4":
        small.weight = bnb.nn.Params4bit(
            weight.cpu().clone(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=small
        )
    else:
        small.weight = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    small.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    placed: nn.Module = small.to(weight.device)  # rounds
    return placed


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
