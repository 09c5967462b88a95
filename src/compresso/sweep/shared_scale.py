"""One scale for all that reads a norm in front of a mixture of experts: chosen for all of its linears together, before
any of them is rounded.

The norm is divided by it, and all weights that read it are multiplied, those of the router, too, which nobody rounds
and which goes on choosing as it did. What was seen of the inputs is divided like the inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresso.arch.producers import Feeder
from compresso.observe.folds import Stats
from compresso.sweep.scaling import Found, divide_
from compresso.sweep.targets import Group, matrix
from compresso.sweep.visitors import Edit

CommonSearch = Callable[[Sequence[tuple[Tensor, Stats]]], Found]
"""Weights [out, in] of each group, one below the other, and what they read -> the scale [in] of all their inputs."""


class ScaledTogether:
    """An edit of groups, before which those that one norm feeds are scaled together.

    Args:
        model: edited in place.
        edit: of each group.
        search: the scale of groups that share their inputs; their statistic is that of `moment_and_size`.
    """

    def __init__(self, model: nn.Module, edit: Edit, search: CommonSearch) -> None:
        self.model, self.edit, self.search = model, edit, search

    def __call__(self, group: Group, seen: Stats) -> Mapping[str, Any]:
        """Edit a group."""
        return self.edit(group, seen)

    @torch.no_grad()
    def prepare(self, groups: Sequence[Group], seen: Mapping[str, Stats]) -> Mapping[str, Any]:
        """Scale the groups of each norm that feeds several, if they are all here; see `Prepares`."""
        sharing: dict[Feeder, list[Group]] = {}
        for group in groups:
            if group.producer is not None and group.producer.readers:
                sharing.setdefault(group.producer, []).append(group)
        notes: dict[str, Any] = {}
        for producer, of in sharing.items():
            names = [name for group in of for name in group.names]
            if set(names) != set(producer.readers) or not any(seen[group.names[0]].n for group in of):
                continue
            pieces = [
                (torch.cat([matrix(self.model, name).float() for name in group.names]), seen[group.names[0]])
                for group in of
            ]
            scale, facts = self.search(pieces)
            divide_(self.model, producer, scale)
            for name in names:
                weight = matrix(self.model, name)
                weight.copy_(weight.float() * scale)
            for name in producer.beside:
                beside = self.model.get_parameter(name)
                beside.copy_(beside.float() * scale)
            for group in of:
                total = seen[group.names[0]].total
                total[:-1] /= scale[:, None] * scale
                total[-1] /= scale
            notes |= {name: {**facts, "scaled": True} for name in names}
        return notes
