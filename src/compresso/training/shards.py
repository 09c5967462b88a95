"""Weights spread over the launched processes while a training loop runs, and whole again at its end: torch's FSDP 2.

Each process keeps a slice of every tensor of the model, of its gradient and of its optimizer state. A block's weights
are gathered when it runs, forward and backward, and dropped behind it; those outside of blocks (embeddings, head, last
norm) stay gathered from the forward to the end of the backward pass. torch's `fully_shard` does all of that. What is
added here is the way back, which torch has none of: stages edit, slice, merge and write whole tensors, so that the
modules must be what they were. Parameters are the same objects before and after; in between they are empty, and the
modules hold others in their places.

What learns outside of the model (gates, multipliers) is a few numbers. It stays whole in every process, so that it can
be clamped and projected as ever, and its gradients are averaged here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.nn.modules.batchnorm import _NormBase

from compresso.errors import Interrupted, NumericError, ResumeError
from compresso.training.groups import Group
from compresso.training.ranks import ranks
from compresso.training.state import whole

Value = TypeVar("Value")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where FSDP leaves hooks that it does not take away."""
_MARKS = (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""What FSDP leaves in a module's dictionary."""


@dataclass(frozen=True)
class Shards:
    """What may be spread over processes while an objective learns.

    Args:
        model: all of whose tensors are, with what lies in it; part of the objective.
        blocks: of it, which are gathered one at a time.
        beside: blocks of a frozen model that runs beside it, such as a teacher; its other tensors stay whole. Those on
            another device than training stay as they are.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    beside: Sequence[nn.Module] = ()


class _Root(nn.Module):
    """What gathers: all that reads spread weights runs inside its forward pass."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, work: Callable[..., Value], *given: Any) -> Value:
        return work(*given)


class Spread(nn.Module):
    """An objective whose model is spread; calling it is calling the objective."""

    def __init__(
        self, root: FSDPModule, objective: nn.Module, places: "list[_Place]", loose: list[nn.Parameter]
    ) -> None:
        super().__init__()
        self._root, self._objective, self._places, self._loose = root, objective, places, loose
        norms = (module for module in objective.modules() if isinstance(module, _NormBase))
        self._running = [buffer for norm in norms for buffer in norm.buffers()]

    def forward(self, *given: Any) -> Any:
        """The objective's output; every process calls this, as often as the others. Running statistics of batch norms
        are the main one's, as under DDP.
        """
        ranks().copied_(self._running)
        return cast(Any, self._root)(self._objective, *given)

    def read(self, work: Callable[[], Value]) -> Value:
        """What `work` returns, which runs the model and changes nothing; every process calls this."""
        with torch.no_grad():
            result = cast(Any, self._root)(work)
        self._root.reshard()  # only a backward pass does so by itself, and training changes the slices
        return result

    def groups(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the parameters that stand in the places of theirs."""
        now = {id(place.kept): place.now for place in self._places}
        return [replace(group, params=[now.get(id(p), p) for p in group.params]) for group in groups]

    def average_(self) -> None:
        """Average the gradients of what is whole over processes; every process calls this behind a backward pass."""
        for parameter in self._loose:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


@dataclass(frozen=True)
class _Place:
    """Where a parameter stands: the module, its name there, and the parameter itself."""

    module: nn.Module
    name: str
    kept: nn.Parameter

    @property
    def now(self) -> nn.Parameter:
        """What stands there now."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found


@contextmanager
def spread(shards: Shards, objective: nn.Module, accelerator: Accelerator) -> Iterator[Spread]:
    """Spread a model over the launched processes within the context.

    At its end the weights that were learned are whole in every process, also behind NumericError, ResumeError and
    Interrupted, which all processes raise alike. Behind any other error they are lost: there may be nobody to gather
    them from.

    Args:
        shards: what is spread.
        objective: what learns, with the model in it; moved to the device of the process.
        accelerator: of this process; more than one was launched.
    """
    objective.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    beside = [block for block in shards.beside if _on(block, accelerator.device)]
    of_model = {id(parameter) for parameter in shards.model.parameters() if _can_be_cut(parameter)}
    loose = [parameter for parameter in objective.parameters() if id(parameter) not in of_model]
    uncut = {one for block in beside for one in block.parameters() if not _can_be_cut(one)}.union(loose)
    root = _Root(objective)
    places = _places([root, *beside], uncut)
    modules = list(dict.fromkeys(module for one in (root, *beside) for module in one.modules()))
    before = [_Before.of(module) for module in modules]
    gathered = False
    try:
        for place in places:
            place.kept.data = place.kept.data.contiguous()  # as fully_shard wants it
        for block in dict.fromkeys([*shards.blocks, *beside]):
            inside = _places([block], uncut)
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=uncut)
            _empty_(inside)  # at once, so that there is never more than the whole and a block's slice
        spread_root = fully_shard(root, mesh=mesh, ignored_params=uncut)
        _empty_(places)
        if beside:  # each of which gathers itself
            share_comm_ctx([cast(FSDPModule, block) for block in dict.fromkeys(beside)])
        held = Spread(spread_root, objective, places, [one for one in loose if one.requires_grad])
        held.read(lambda: _gather_once(spread_root))
        try:
            yield held
        except (NumericError, ResumeError, Interrupted):
            gathered = True
            raise
        else:
            gathered = True
        finally:
            if gathered:
                _gather_(places)
    finally:
        for one in before:
            one.restore_()


def _gather_once(root: FSDPModule) -> None:
    """Gather every block and drop it, so that what it is gathered into is made here: an evaluation would make it in
    inference mode, and nothing learns through such tensors.
    """
    for module in cast(nn.Module, root).modules():
        if isinstance(module, FSDPModule) and module is not root:
            module.unshard()
            module.reshard()


def _on(block: nn.Module, device: torch.device) -> bool:
    return all(parameter.device.type == device.type for parameter in block.parameters())


def _can_be_cut(parameter: nn.Parameter) -> bool:
    return bool(parameter.dim() and parameter.numel())


def _places(modules: Sequence[nn.Module], uncut: set[nn.Parameter]) -> list[_Place]:
    """Every place of every other parameter below some modules, in the same order in all processes."""
    owners = dict.fromkeys(one for module in modules for one in module.modules())
    return [
        _Place(owner, name, parameter)
        for owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter not in uncut
    ]


def _empty_(places: Sequence[_Place]) -> None:
    """Give the memory of parameters back that others stand in for."""
    for place in places:
        place.kept.data = place.kept.data.new_empty(0)


@torch.no_grad()
def _gather_(places: Sequence[_Place]) -> None:
    """Put whole tensors into the parameters that stood there, one after the other; every process calls this."""
    done: dict[int, Tensor] = {}
    for place in places:
        if id(place.kept) not in done:
            done[id(place.kept)] = place.kept.data = whole(place.now)
        place.module._parameters[place.name] = place.kept


@dataclass(frozen=True)
class _Before:
    """A module as it was before FSDP came."""

    module: nn.Module
    kind: type[nn.Module]
    hooks: dict[str, set[Any]]
    marks: set[str]

    @classmethod
    def of(cls, module: nn.Module) -> "_Before":
        own = vars(module)
        hooks = {name: set(own.get(name, ())) for name in _HOOKS}
        return cls(module, type(module), hooks, {mark for mark in _MARKS if mark in own})

    def restore_(self) -> None:
        own = vars(self.module)
        self.module.__class__ = self.kind
        for name, keys in self.hooks.items():
            for key in [key for key in own.get(name, ()) if key not in keys]:
                del own[name][key]
        for mark in _MARKS:
            if mark in own and mark not in self.marks:
                del own[mark]
        _module_state_mapping.pop(self.module, None)
