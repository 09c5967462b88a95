"""Adapters on what is no linear: stacked experts, one adapter each, and routers (LoRA, arXiv 2106.09685).

peft adapts a parameter by adding B A to it while its module runs. Of a stack [experts, out, in] its A is [rank x
experts, in], the rows of one expert side by side, and its B [out, rank x experts], the columns of one expert `experts`
apart.
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from compresso.arch.mixture import EXPERTS
from compresso.arch.routers import ROUTERS

ROUTER = "router"
"""The target that means routers, whatever a family calls them."""
_STACKS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""Which stack holds what LLaMA calls so."""


def parameter_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """For each target that stacked experts or routers stand for, how the names of their parameters end."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owner, _, own = name.rpartition(".")
        if own != EXPERTS or not hasattr(module, _STACKS["down_proj"]):
            continue
        last = owner.rpartition(".")[2]
        for target in targets:
            if target in _STACKS:
                found.setdefault(target, []).append(f"{last}.{EXPERTS}.{_STACKS[target]}")
            elif target == ROUTER:
                router = next(one for one in ROUTERS if f"{owner}.{one}" in modules)
                found.setdefault(target, []).append(f"{last}.{router}.weight")
    return {target: sorted(set(names)) for target, names in found.items()}


def adapted_parameter(layer: ParamWrapper) -> nn.Parameter:
    """The parameter that an adapter lies on."""
    return layer.get_base_layer().get_parameter(layer.parameter_name)


def update_of(layer: ParamWrapper) -> Tensor:
    """What an adapter adds to its parameter, of that shape, float32 or wider, without the factor."""
    parameter = adapted_parameter(layer)
    a, b = (part.get_submodule("default").get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    wide = torch.promote_types(parameter.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    if parameter.dim() == 2:
        return b @ a
    experts = len(parameter)
    update = torch.einsum("ore,eri->eoi", b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1]))
    return update.transpose(1, 2) if getattr(layer.get_base_layer(), "is_transposed", False) else update
