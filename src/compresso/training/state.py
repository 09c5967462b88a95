"""What changes while a model trains, as plain named tensors: trainable parameters, persistent buffers, optimizer state.

Frozen weights are not part of it: they are the input of the run, and reading them again is cheaper than writing them.
Sharded parameters (FSDP) are gathered to whole tensors on the way out and cut up again on the way in, so a state does
not depend on how many processes made it.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from compresso.errors import ResumeError


@runtime_checkable
class ChangesShape(Protocol):
    """A module whose parameters lose entries while it trains."""

    def take_shape_(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the parameters the shapes that they had when `collect` took these; their values are put back next."""
        ...


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; a shared parameter once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def is_sharded(module: nn.Module) -> bool:
    """Whether a trainable parameter is spread over processes."""
    return any(isinstance(p, DTensor) for p in trainable(module).values())


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; gathered from all processes if it is sharded (then every process must call this)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all trainable parameters on the CPU, whole; every process must call this if any is sharded."""
    return {name: _kept(p) for name, p in trainable(module).items()}


def learned(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what learns on the CPU, without the optimizer's state: `param/<name>`, `buffer/<name>`; every process
    must call this if any is sharded.
    """
    tensors = {f"param/{name}": tensor for name, tensor in trained(module).items()}
    return tensors | {f"buffer/{name}": _kept(b) for name, b in _buffers(module).items()}


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the training state on the CPU: `param/<name>`, `buffer/<name>`, `optimizer/<name>/<key>`.

    Every process must call this if any parameter is sharded.
    """
    tensors = learned(module)
    for name, p in trainable(module).items():
        tensors |= {f"optimizer/{name}/{key}": _kept(value) for key, value in optimizer.state.get(p, {}).items()}
    return tensors


@torch.no_grad()
def restore_(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `collect` took, in place; a module that changes its shape takes that of the state first.

    Raises:
        ResumeError: the names or shapes are not those of this module.
    """
    if isinstance(module, ChangesShape):
        module.take_shape_(tensors)
    put_(module, {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")})
    optimizer.state.clear()
    for name, p in trainable(module).items():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            # AdamW keeps its step counts on the CPU, and its moments where and how the parameter lies
            optimizer.state[p] = {
                key: value.clone() if value.shape != p.shape or key == "step" else _like(value, p)
                for key, value in state.items()
            }


@torch.no_grad()
def put_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `learned` took, in place.

    Raises:
        ResumeError: the names or shapes are not those of this module.
    """
    params, buffers = trainable(module), _buffers(module)
    wanted = {f"param/{name}": p for name, p in params.items()} | {f"buffer/{name}": b for name, b in buffers.items()}
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())
        raise ResumeError(
            f"{len(odd)} tensors are only in the checkpoint or only in the model, the first is {odd[0]}; resume the"
            " same model"
        )
    for name, target in wanted.items():
        if target.shape != tensors[name].shape:
            raise ResumeError(
                f"{name} is {tuple(tensors[name].shape)} in the checkpoint, {tuple(target.shape)} in the model; resume"
                " the same model"
            )
        target.copy_(_like(tensors[name], target))


def _kept(tensor: Tensor) -> Tensor:
    return whole(tensor).to("cpu", copy=True).contiguous()


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    moved = tensor.to(target.device, target.dtype, copy=True)
    return distribute_tensor(moved, target.device_mesh, target.placements) if isinstance(target, DTensor) else moved


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True)
    return {name: b for name, b in module.named_buffers() if name in saved}
