"""What a sweep does at a block: groups of linears edited by a statistic of what they read, or a whole block visited."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel

from compresso.errors import NumericError
from compresso.observe.folds import Fold, Stats, merge_
from compresso.observe.overflow import finite
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.block import BlockEdit, BlockRunner, BlockVisit, Reference, learning
from compresso.sweep.finite import check_edited
from compresso.sweep.looking import looking
from compresso.sweep.targets import Group, Groups
from compresso.training.ranks import ALONE, Ranks

Edit = Callable[[Group, Stats], Mapping[str, Any]]
"""Changes the weights of a group's linears in place; returns what is to be noted of them, JSON values by full name."""


@runtime_checkable
class Prepares(Protocol):
    """An edit that wants to see all groups that were looked at together before it edits the first."""

    def prepare(self, groups: Sequence[Group], seen: Mapping[str, Stats]) -> Mapping[str, Any]:
        """Change weights and statistics in place; what is to be noted, by full name."""
        ...


class Visitor(Protocol):
    """What a sweep does at its blocks."""

    @property
    def keeps_states(self) -> bool:
        """Whether a visit leaves the states that the next block reads."""
        ...

    def pass_dense(self, runner: BlockRunner) -> None:
        """See a block that is still dense, also one that the journal has finished."""
        ...

    def visit(self, groups: Sequence[Group], runner: BlockRunner) -> dict[str, Any]:
        """Edit a block; returns what is to be noted."""
        ...

    def discard(self) -> None:
        """Forget everything."""
        ...


@dataclass(frozen=True)
class GroupVisitor:
    """Looks at a block's groups, together or one after another (the experts of a stack together), and edits them.

    How many tokens an expert read is noted with it.
    """

    model: PreTrainedModel
    fold: Fold
    edit: Edit
    true_sequential: bool
    keeps_states: bool
    ranks: Ranks = ALONE

    def pass_dense(self, runner: BlockRunner) -> None:
        """Nothing is wanted of dense blocks."""

    def visit(self, groups: Sequence[Group], runner: BlockRunner) -> dict[str, Any]:
        """See `Visitor`. Raises NumericError as `sweep` does."""
        notes: dict[str, Any] = {}
        turns = [list(of) for _, of in groupby(groups, lambda group: group.turn)] if self.true_sequential else [groups]
        for together in turns:
            with (
                self.ranks.failing_alike(),
                looking(self.model, together, self.fold) as seen,
                _nearest(together, seen),
            ):
                runner.run(keep=self.keeps_states)
            merge_(seen, self.fold, self.ranks)
            for group in together:
                check_seen(group, seen)
            whole: object = self.edit
            told = whole.prepare(together, seen) if isinstance(whole, Prepares) else {}
            for group in together:
                tokens = seen[group.names[0]].n
                found = self.edit(group, seen.pop(group.names[0]))
                notes |= {name: {**facts, **told.get(name, {})} for name, facts in found.items()}
                if group.stack is not None:
                    notes |= {name: {**notes.get(name, {}), "tokens": tokens} for name in group.names}
                check_edited(self.model, [group])
        return notes

    def discard(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class BlockVisitor:
    """Hands whole blocks to an edit, with their dense outputs."""

    model: PreTrainedModel
    fold: Fold | None
    edit: BlockEdit
    first: int
    dense: ActivationStore
    keeps_states: bool = False
    groups: Groups = field(default_factory=dict[int, Sequence[Group]])
    seen_dense: dict[str, Stats] = field(default_factory=dict[str, Stats])
    ranks: Ranks = ALONE

    def pass_dense(self, runner: BlockRunner) -> None:
        """Go on with the dense model, if its outputs are wanted."""
        if self.edit.reference is Reference.BLOCK or runner.layer < self.first:
            return
        if runner.layer == self.first:  # up to here its states are those of the edited model
            for i in range(len(runner)):
                self.dense.put(i, runner.batch(i).hidden)
        here = self.groups.get(runner.layer, ()) if self.edit.looks_dense else ()
        with (
            self.ranks.failing_alike(),
            looking(self.model, here, self.fold) if self.fold and here else nullcontext({}) as seen,
        ):
            runner.on(self.dense).run(keep=True)
        if self.fold:
            merge_(seen, self.fold, self.ranks)
        self.seen_dense.clear()
        self.seen_dense.update(seen)

    def visit(self, groups: Sequence[Group], runner: BlockRunner) -> dict[str, Any]:
        """See `Visitor`. Raises NumericError as `sweep` does."""
        with (
            self.ranks.failing_alike(),
            looking(self.model, groups, self.fold) if self.fold else nullcontext({}) as seen,
        ):
            if self.edit.reference is Reference.BLOCK:
                runner.run(keep=True, into=self.dense)
            elif self.fold:
                runner.run(keep=False)
        if self.fold:
            merge_(seen, self.fold, self.ranks)
        for group in groups if self.fold else ():
            check_seen(group, seen)
        with learning(runner.block):
            visit = BlockVisit(runner.layer, runner.block, groups, seen, self.dense, runner, dict(self.seen_dense))
            notes = dict(self.edit.edit(visit))
        check_edited(self.model, groups)
        return notes

    def discard(self) -> None:
        """Forget the dense outputs."""
        self.dense.discard()


@contextmanager
def _nearest(groups: Sequence[Group], seen: Mapping[str, Stats]) -> Iterator[None]:
    """Name the first linear that reads NaN or Inf, where there is one, rather than the layer that outputs them."""
    try:
        yield
    except NumericError:
        for group in groups:
            if group.names[0] in seen:
                check_seen(group, seen)
        raise


def check_seen(group: Group, seen: Mapping[str, Stats]) -> None:
    """Raise NumericError if no token reached a group, or its statistic is not finite."""
    name = group.names[0]
    if name not in seen:
        raise NumericError(f"no calibration token reached {name}; give more examples, or add it to where.ignore")
    if not finite(seen[name].total):
        raise NumericError(f"{name} reads NaN or Inf: the model overflows on this data; use float32 or bfloat16")
