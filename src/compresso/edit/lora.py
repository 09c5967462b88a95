"""Low-rank adapters through peft: attached, merged, saved (LoRA, arXiv 2106.09685).

Unusual: the initial A comes from a generator on the CPU, so a seed gives the same adapters on every device; and merging
checks every sum for NaN and Inf before it changes the first weight.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import arch_for
from compresso.edit.expert_lora import ROUTER, adapted_parameter, parameter_targets, update_of
from compresso.errors import NumericError, RecipeError, nearest

log = logging.getLogger(__name__)

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of a layer of LLaMA, and of the families that have its names."""
_KEYS_AND_VALUES = ("kv_a_proj_with_mqa", "kv_b_proj")
_LATENT = {"q_proj": ("q_a_proj", "q_b_proj"), "k_proj": _KEYS_AND_VALUES, "v_proj": _KEYS_AND_VALUES}
"""What together does the same in an attention that keeps a compressed vector a token (DeepSeek-V2 and V3)."""


def attach_(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    seed: int = 0,
    strict: bool = False,
) -> PeftModel:
    """Freeze the model and put an adapter on each linear whose last name is a target; layers that have none are
    skipped, and so is a target that the architecture knows and that left every layer, which is said.

    Where an architecture has no linear of that name, but one that does what LLaMA's of that name does (GPT-2's
    `attn.c_attn` for `q_proj`), the adapter is put there; where two do it (DeepSeek's `q_a_proj` and `q_b_proj`), on
    both. Stacked experts get one each, gate and up one between them; "router" means the routers of a mixture
    (`edit/expert_lora.py`). On a `Conv1D`, whose weight is [in, out], it is transposed. The update of a weight is
    alpha / rank * B A, with A [rank, in] uniform as torch initialises a linear and B [out, rank] zero, both float32
    whatever the base's dtype.

    strict: refuse a target that left every layer, too, as a dry run does while the budget can still be changed.

    Raises:
        RecipeError: a target that the architecture does not know, none that is left, a rank below 1, and dropout in
            front of what is no linear.
    """
    head = model.get_output_embeddings()  # may be the embedding, so it is no target
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    linears = {name.rpartition(".")[2] for name in modules}
    parts = getattr(arch_for(model.config), "parts", None)
    names: list[str] = []
    left: list[str] = []
    apart = parameter_targets(model, targets)
    for target in targets:
        known = target if target in _LINEARS else None
        if target == ROUTER:
            if target not in apart:
                raise RecipeError("no layer of this model has a router; give targets of linears")
            continue
        if target not in linears and (pair := [one for one in _LATENT.get(target, ()) if one in linears]):
            names += pair
            continue
        name = target if target in linears else known if parts is None else parts.standing_for(target)
        if name is None:
            known_ones = [*linears, *parameter_targets(model, (*_LINEARS, ROUTER))]
            raise RecipeError(f"no linear in this model's layers is named '{target}'; {nearest(target, known_ones)}")
        here = any(f".{one}".endswith(f".{name}") for one in modules)
        if here or target not in apart:
            (names if here else left).append(name)
    stacked = sorted({one for of_target in apart.values() for one in of_target})
    if stacked and dropout:
        raise RecipeError(
            f"dropout={dropout:g} lies in front of linears, and {stacked[0]} is none; give dropout: 0, or targets"
            " without those of experts and routers"
        )
    if targets and not names and not stacked:
        raise RecipeError(
            "no linear is left in this model's layers to put adapters on: the budget removed them all; keep more"
        )
    if left and strict:
        raise RecipeError(f"no layer has {', '.join(left)} any more, and adapters are to lie there; keep more")
    if left:
        log.warning("adapters: no layer has %s any more, since their sub-layers were all removed", ", ".join(left))
    adapted_ones = [
        module for name, module in modules.items() if f".{name}".endswith(tuple(f".{one}" for one in names))
    ]
    if rank < 1 or not targets:
        raise RecipeError(
            f"adapters need rank >= 1 and at least one target, got rank={rank} and targets={list(targets)}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # declared int, used as a factor
        target_modules=list(dict.fromkeys(names)),
        target_parameters=stacked or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adapted_ones),
        lora_dropout=dropout,
        bias="none",
        task_type=TaskType.CAUSAL_LM if model.can_generate() else None,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # peft draws an A of its own first
        # peft 0.21 still asks transformers by the old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    if not dropout:
        for _, layer in _adapters(adapted):
            if not isinstance(layer, ParamWrapper):
                layer._cast_input_dtype = _widened  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _adapters(adapted):
            a = layer.lora_A.get_submodule("default").get_parameter("weight")
            if not a.is_meta:
                values = torch.empty(a.shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
                a.copy_(values)
    return adapted


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What an adapter reads, in the type of its weights; as it is where autocast would round it back at once."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == x.dtype:
        return x
    return x.to(dtype)


def merge_(adapted: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights and return the base model without them; its parameters remain frozen.

    Raises:
        NumericError: before any weight is changed, if a merged weight would not be finite.
    """
    with torch.no_grad():
        for name, layer in _adapters(adapted):
            if not bool(torch.isfinite(_merged(layer)).all()):
                raise NumericError(
                    f"merging adapters makes {name}.weight NaN or Inf; the training diverged, resume from an earlier"
                    " state"
                )
        for _, layer in _adapters(adapted):
            _base(layer).copy_(_merged(layer))
    base = adapted.unload()
    assert isinstance(base, PreTrainedModel)
    return base


def adapter_parameters(adapted: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
    """B [out, rank], A [rank, in] and the factor of each adapter, by the name of the base weight [out, in]: the live
    parameters.

    Raises:
        RecipeError: an adapter on a `Conv1D`, whose weight is [in, out].
    """
    for name, layer in _adapters(adapted):
        if isinstance(layer, ParamWrapper):
            raise RecipeError(
                f"{name}.{layer.parameter_name} is no linear, whose units could be scored by adapters; give targets:"
                " [q_proj, k_proj, v_proj, o_proj], or prune this model by its weights or gradients"
            )
        if isinstance(layer.get_base_layer(), Conv1D):
            raise RecipeError(
                f"{name} is a Conv1D, whose units cannot be scored by adapters; prune this model by its weights or"
                " gradients"
            )
    return {
        f"{name}.weight": (
            layer.lora_B.get_submodule("default").get_parameter("weight"),
            layer.lora_A.get_submodule("default").get_parameter("weight"),
            layer.scaling["default"],
        )
        for name, layer in _adapters(adapted)
    }


def adapter_factors(adapted: PeftModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """As `adapter_parameters`, detached, not copied."""
    return {name: (b.detach(), a.detach(), scale) for name, (b, a, scale) in adapter_parameters(adapted).items()}


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write the adapters as peft does: `adapter_model.safetensors` and `adapter_config.json`.

    The name of the base model is left empty: it would be a folder of this machine.
    """
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = ""
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card names that folder too


def _adapters(adapted: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers with their names in the base model."""
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _base(layer: LoraLayer) -> nn.Parameter:
    """The parameter that an adapter lies on."""
    if isinstance(layer, ParamWrapper):
        return adapted_parameter(layer)
    return layer.get_base_layer().get_parameter("weight")


def _merged(layer: LoraLayer) -> Tensor:
    """A base weight plus its adapter's update, summed in float32 or wider and cast to the base's dtype."""
    weight = _base(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(layer, ParamWrapper):
        update = update_of(layer)
    else:
        a, b = (part.get_submodule("default").get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
        update = b.to(wide) @ a.to(wide)
        update = update.T if isinstance(layer.get_base_layer(), Conv1D) else update
    return (weight.to(wide) + layer.scaling["default"] * update).to(weight.dtype)
