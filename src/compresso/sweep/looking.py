"""What the linears of a block read while it runs, folded as it appears: one hook a linear, and for stacked experts one
hook on the module that holds them, which sorts tokens by the experts that they chose.

An expert reads its own tokens alone, each once, whatever weight the router gives to what it writes: so that its
statistic is that of the same expert as linears of their own. One that no token chose has a statistic of no tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.errors import ArchError
from compresso.observe.experts import read_by
from compresso.observe.folds import Fold, Stats
from compresso.sweep.targets import Group


@contextmanager
def looking(model: PreTrainedModel, groups: Sequence[Group], fold: Fold) -> Iterator[dict[str, Stats]]:
    """Within the context, what each group reads is folded: name of its first linear -> what was seen.

    Raises ArchError, when the model runs, where linears of a group do not read the same.
    """
    seen: dict[str, Stats] = {}
    read: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if name not in seen:
            seen[name] = Stats(fold(None, flat), len(flat))
        elif len(flat):
            seen[name].total = fold(seen[name].total, flat)
            seen[name].n += len(flat)

    def first(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs: Tensor = arguments[0] if arguments else named["input"]
            read[name] = inputs
            if inputs.numel():
                see(name, inputs)

        return hook

    def other(name: str, like: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs: Tensor = arguments[0] if arguments else named["input"]
            if inputs is not read[like] and not torch.equal(inputs, read[like]):
                raise ArchError(
                    f"{name} does not read what {like} reads, so they cannot share a statistic; correct `linear_groups`"
                )

        return hook

    def mixture(names: Sequence[str]) -> Callable[..., None]:
        def hook(experts: nn.Module, arguments: tuple[Any, ...]) -> None:
            states, numbers = arguments[:2]
            for name in names:
                _, stack, number = name.rsplit(".", 2)
                chose = (numbers == int(number)).any(-1)
                see(name, read_by(experts, stack, int(number), states[chose]))

        return hook

    handles: list[torch.utils.hooks.RemovableHandle] = []
    stacked: dict[str, list[str]] = {}
    try:
        for group in groups:
            if group.stack is not None:
                stacked.setdefault(group.stack.rpartition(".")[0], []).extend(group.names)
                continue
            for place, name in enumerate(group.names):
                hook = first(name) if place == 0 else other(name, group.names[0])
                handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for module, names in stacked.items():
            handles.append(model.get_submodule(module).register_forward_pre_hook(mixture(names)))
        yield seen
    finally:
        read.clear()
        for handle in handles:
            handle.remove()
