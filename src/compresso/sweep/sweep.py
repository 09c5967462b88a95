"""One pass over a model, block after block, each calibrated on the outputs of the already edited blocks before it.

The loop of SparseGPT, Wanda and GPTQ: look at the inputs of a block's linears while it is still as it was, edit them,
run the block again for the inputs of the next. Linears that read the same input share one statistic. With
`true_sequential` a block is looked at again after each group of linears, so that those behind see the edited ones
before them. Blocks behind the last edited one are not run.

An edit of a `BlockEdit` visits each block as a whole instead, with gradients on; see `compresso.sweep.block`.

Calibration rows of equal length run together, so nothing is padded and statistics hold real tokens only. What else a
block is called with is recorded in one pass before the first block; see `compresso.sweep.calls`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import ArchError, Interrupted, NumericError, RecipeError
from compresso.observe.folds import Fold
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.block import BlockEdit, BlockRunner, BlockVisit, Reference, learning
from compresso.sweep.calls import recorded_calls
from compresso.sweep.finite import check_edited, check_weights, finite
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.targets import Group, Groups, edited_names
from compresso.training.progress import Progress
from compresso.training.signals import SIGNALS, noted_signals


@dataclass
class Stats:
    """What a group of linears read: the statistic, and how many tokens it is of."""

    total: Tensor
    tokens: int


Edit = Callable[[Group, Stats], Mapping[str, Any]]
"""Changes the weights of a group's linears in place; returns what is to be noted of them, JSON values by full name."""


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    arch: Arch,
    groups: Groups,
    batches: Sequence[Tensor],
    fold: Fold | None,
    edit: Edit | BlockEdit,
    *,
    place: Place = "device",
    scratch: Path = Path("activations"),
    true_sequential: bool = False,
    collect_only: bool = False,
    rescales: bool = False,
    journal: Journal | None = None,
    offloaded: Offloaded | None = None,
    progress: Progress | None = None,
    name: str = "sweep",
) -> dict[str, Any]:
    """Look at each group of linears and edit it, block after block.

    Args:
        model: edited in place.
        arch: knows its blocks.
        groups: the linears to work on.
        batches: ids [rows, seq] each, of rows that need no padding.
        fold, edit: see `Fold`, whose rows are inputs of tokens [tokens, in], float32, `Edit` and `BlockEdit`. A
            `BlockEdit` may do without statistics: its `fold` may be None.
        place, scratch: where the states between two blocks are kept, and the folder for "disk".
        true_sequential: look again after each group.
        collect_only: `edit` changes nothing, so that no block is run twice.
        rescales: `edit` changes what feeds a group, too.
        journal: of finished blocks, which are read instead of done; None keeps none.
        offloaded: where weights of a model on the meta device come from, block by block; the journal holds the edited
            ones.
        progress, name: display.

    Returns:
        What `edit` noted, by full name.

    Raises:
        NumericError: NaN or Inf in a weight or in what a linear reads, or a linear that no token reached.
        ArchError: linears of a group do not read the same input.
        RecipeError: `true_sequential` for an edit that visits whole blocks.
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    if isinstance(edit, BlockEdit) and true_sequential:
        raise RecipeError(f"{name} edits a block as a whole, not its groups one by one; set true_sequential to false")
    if offloaded is None:
        check_weights(model, groups)
    blocks, last = arch.blocks(model), max(groups)
    done = set(journal.finished(list(groups))) if journal else set[int]()
    states = ActivationStore(place, offloaded.device if offloaded else model.device, scratch)
    visitor: _Visitor
    if isinstance(edit, BlockEdit):
        dense = ActivationStore(place, states.device, scratch / "dense")
        visitor = _BlockVisitor(model, fold, edit, min(groups), dense)
    else:
        assert fold is not None, "an edit of groups needs a statistic"
        visitor = _GroupVisitor(model, fold, edit, true_sequential, collect_only)
    notes: dict[str, Any] = {}
    model.eval()
    shown = progress or Progress("silent")
    tokens = float(sum(batch.numel() for batch in batches))
    try:
        with offloaded.loaded(offloaded.around(blocks)) if offloaded else nullcontext():
            calls = recorded_calls(model, blocks, batches, states)
        with noted_signals() as requests, shown.running(last + 1, 0):
            for layer, block in enumerate(blocks[: last + 1]):
                runner = BlockRunner(block, layer, [of_batch[layer] for of_batch in calls], states)
                here = groups.get(layer, ())
                with offloaded.loaded(offloaded.of_block(block)) if offloaded else nullcontext():
                    visitor.pass_dense(runner)
                    if journal and layer in done:
                        weights, facts = journal.read(layer)
                        for parameter, weight in weights.items():
                            model.get_parameter(parameter).copy_(weight)
                    else:
                        facts = visitor.visit(here, runner) if here else {}
                        if journal and here:
                            journal.write(
                                layer,
                                {one: model.get_parameter(one) for one in edited_names(model, here, rescales)},
                                facts,
                            )
                    notes |= facts
                    if offloaded and journal and here:
                        offloaded.store.replace(journal.weights(layer))
                    if layer < last and not (here and visitor.keeps_states):
                        runner.run(keep=True)
                shown.step(layer + 1, name, {}, tokens)
                if requests.arrived:
                    stop = next(signal for signal in reversed(SIGNALS) if signal in requests.arrived)
                    raise Interrupted(stop, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        states.discard()
        visitor.discard()
    return notes


class _Visitor(Protocol):
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
class _GroupVisitor:
    """Looks at a block's groups, together or one after another, and edits them."""

    model: PreTrainedModel
    fold: Fold
    edit: Edit
    true_sequential: bool
    keeps_states: bool

    def pass_dense(self, runner: BlockRunner) -> None:
        """Nothing is wanted of dense blocks."""

    def visit(self, groups: Sequence[Group], runner: BlockRunner) -> dict[str, Any]:
        """See `_Visitor`. Raises NumericError as `sweep` does."""
        notes: dict[str, Any] = {}
        for together in [[group] for group in groups] if self.true_sequential else [groups]:
            with _looking(self.model, together, self.fold) as seen:
                runner.run(keep=self.keeps_states)
            for group in together:
                check_seen(group, seen)
                notes |= self.edit(group, seen.pop(group.names[0]))
                check_edited(self.model, [group])
        return notes

    def discard(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class _BlockVisitor:
    """Hands whole blocks to an edit, with their dense outputs."""

    model: PreTrainedModel
    fold: Fold | None
    edit: BlockEdit
    first: int
    dense: ActivationStore
    keeps_states: bool = False

    def pass_dense(self, runner: BlockRunner) -> None:
        """Go on with the dense model, if its outputs are wanted."""
        if self.edit.reference is Reference.BLOCK or runner.layer < self.first:
            return
        if runner.layer == self.first:  # up to here its states are those of the edited model
            for i in range(len(runner)):
                self.dense.put(i, runner.batch(i).hidden)
        runner.on(self.dense).run(keep=True)

    def visit(self, groups: Sequence[Group], runner: BlockRunner) -> dict[str, Any]:
        """See `_Visitor`. Raises NumericError as `sweep` does."""
        with _looking(self.model, groups, self.fold) if self.fold else nullcontext({}) as seen:
            if self.edit.reference is Reference.BLOCK:
                runner.run(keep=True, into=self.dense)
            elif self.fold:
                runner.run(keep=False)
        for group in groups if self.fold else ():
            check_seen(group, seen)
        with learning(runner.block):
            notes = dict(self.edit.edit(BlockVisit(runner.layer, runner.block, groups, seen, self.dense, runner)))
        check_edited(self.model, groups)
        return notes

    def discard(self) -> None:
        """Forget the dense outputs."""
        self.dense.discard()


def check_seen(group: Group, seen: Mapping[str, Stats]) -> None:
    """Raise NumericError if no token reached a group, or its statistic is not finite."""
    name = group.names[0]
    if name not in seen:
        raise NumericError(f"no calibration token reached {name}; give more examples, or add it to ignore")
    if not finite(seen[name].total):
        raise NumericError(f"{name} reads NaN or Inf: the model overflows on this data; use float32 or bfloat16")


@contextmanager
def _looking(model: PreTrainedModel, groups: Sequence[Group], fold: Fold) -> Iterator[dict[str, Stats]]:
    """Within the context, what each group reads is folded: name of its first linear -> what was seen."""
    seen: dict[str, Stats] = {}
    read: dict[str, Tensor] = {}

    def first(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs: Tensor = arguments[0] if arguments else named["input"]
            read[name] = inputs
            flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            if name in seen:
                seen[name].total = fold(seen[name].total, flat)
                seen[name].tokens += len(flat)
            elif len(flat):
                seen[name] = Stats(fold(None, flat), len(flat))

        return hook

    def other(name: str, like: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs: Tensor = arguments[0] if arguments else named["input"]
            if inputs is not read[like] and not torch.equal(inputs, read[like]):
                raise ArchError(
                    f"{name} does not read what {like} reads, so they cannot share a statistic; correct `linear_groups`"
                )

        return hook

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for group in groups:
            for place, name in enumerate(group.names):
                hook = first(name) if place == 0 else other(name, group.names[0])
                handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        yield seen
    finally:
        read.clear()
        for handle in handles:
            handle.remove()
