"""One pass over a model, block after block, each calibrated on what the already edited blocks before it give out.

The loop of SparseGPT, Wanda and GPTQ: look at the inputs of a block's linears while it is still as it was, edit them,
run the block again for the inputs of the next. Linears that read the same input share one statistic. With
`true_sequential` a block is looked at again after each group of linears, so that those behind see the edited ones
before them. Blocks behind the last edited one are not run.

Calibration rows of equal length run together, so nothing is padded and statistics hold real tokens only. What else a
block is called with (mask, positions, rotary tables, whatever the version of transformers or the architecture passes)
is recorded for every block in one pass in which blocks hand their input on; the blocks see nothing of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import ArchError, NumericError
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.targets import Group, Groups, edited_names, weight_of
from compresso.training.progress import Progress
from compresso.training.signals import SIGNALS, Interrupted, noted_signals

Fold = Callable[[Tensor | None, Tensor], Tensor]
"""A statistic: what it is so far (None at first) and inputs [tokens, in], float32 -> what it is then."""


@dataclass
class Stats:
    """What a group of linears read: the statistic, and how many tokens it is of."""

    total: Tensor
    tokens: int


Edit = Callable[[Group, Stats], Mapping[str, Any]]
"""Changes the weights of a group's linears in place; returns what is to be noted of them, JSON values by full name."""


def squares(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Fold: sum of squares of each input [in]."""
    found = inputs.square().sum(dim=0)
    return found if total is None else total.add_(found)


def second_moment(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Fold: sum of x x^T [in, in]. It is symmetric:
    products of the upper half are computed, in stripes, and mirrored.
    """
    size = inputs.shape[1]
    found = inputs.new_zeros(size, size) if total is None else total
    stripe = max(_STRIPE, -(-size // 8))
    for begin in range(0, size, stripe):
        end = min(begin + stripe, size)
        found[begin:end, begin:].addmm_(inputs[:, begin:end].T, inputs[:, begin:])
        square = found[begin:end, begin:end]
        square.copy_(
            square.triu() + square.triu(1).T
        )  # a product of a matrix with itself need not be symmetric to the last bit
        found[end:, begin:end] = found[begin:end, end:].T
    return found


_STRIPE = 128
"""Columns of a second moment from which on a product is worth a call of its own."""


@dataclass
class _Call:
    """What a block is called with beside the hidden states."""

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict[str, Any])


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    arch: Arch,
    groups: Groups,
    batches: Sequence[Tensor],
    fold: Fold,
    edit: Edit,
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
        fold, edit: see `Fold` and `Edit`.
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
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    if offloaded is None:
        check_weights(model, groups)
    blocks, last = arch.blocks(model), max(groups)
    done = set(journal.finished(list(groups))) if journal else set[int]()
    states = ActivationStore(place, offloaded.device if offloaded else model.device, scratch)
    notes: dict[str, Any] = {}
    model.eval()
    shown = progress or Progress("silent")
    tokens = float(sum(batch.numel() for batch in batches))
    try:
        with offloaded.loaded(offloaded.around(blocks)) if offloaded else nullcontext():
            calls = _recorded(model, blocks, batches, states)
        with noted_signals() as requests, shown.running(last + 1, 0):
            for layer, block in enumerate(blocks[: last + 1]):
                run = _Runner(block, layer, [calls[i][layer] for i in range(len(batches))], states)
                here = groups.get(layer, ())
                with offloaded.loaded(offloaded.of_block(block)) if offloaded else nullcontext():
                    if journal and layer in done:
                        weights, facts = journal.read(layer)
                        for parameter, weight in weights.items():
                            model.get_parameter(parameter).copy_(weight)
                    else:
                        facts = _edited(model, here, run, fold, edit, true_sequential, keep=collect_only)
                        if journal and here:
                            journal.write(
                                layer,
                                {one: model.get_parameter(one) for one in edited_names(model, here, rescales)},
                                facts,
                            )
                    notes |= facts
                    if offloaded and journal and here:
                        offloaded.store.replace(journal.weights(layer))
                    if layer < last and not (collect_only and here):
                        run(keep=True)
                shown.step(layer + 1, name, {}, tokens)
                if requests.arrived:
                    stop = next(signal for signal in reversed(SIGNALS) if signal in requests.arrived)
                    raise Interrupted(stop, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        states.discard()
    return notes


def _edited(
    model: PreTrainedModel,
    here: Sequence[Group],
    run: "_Runner",
    fold: Fold,
    edit: Edit,
    true_sequential: bool,
    keep: bool,
) -> dict[str, Any]:
    """Look at a block's groups, together or one after another, and edit them."""
    notes: dict[str, Any] = {}
    for together in [[group] for group in here] if true_sequential else [here] if here else []:
        with _looking(model, together, fold) as seen:
            run(keep=keep)
        for group in together:
            if group.names[0] not in seen:
                raise NumericError(
                    f"no calibration token reached {group.names[0]}; give more examples, or add it to ignore"
                )
            found = seen.pop(group.names[0])
            if not _finite(found.total):
                raise NumericError(
                    f"{group.names[0]} reads NaN or Inf: the model overflows on this data; use float32 or bfloat16"
                )
            notes |= edit(group, found)
            _check_finite(model, [group], "was made NaN or Inf; give more calibration examples, or raise damping")
    return notes


class _Runner:
    """Runs one block on all batches."""

    def __init__(self, block: nn.Module, layer: int, calls: Sequence[_Call], states: ActivationStore) -> None:
        self._block, self._layer, self._calls, self._states = block, layer, calls, states

    def __call__(self, keep: bool) -> None:
        """keep: replace the states by what the block gives out."""
        for i, call in enumerate(self._calls):
            given = self._block(self._states[i], *call.arguments, **call.named)
            left: Tensor = given[0] if isinstance(given, tuple) else given
            if keep:
                if not _finite(left):
                    raise NumericError(
                        f"layer {self._layer} gives out NaN or Inf: the model overflows on this data; use float32 or"
                        " bfloat16"
                    )
                self._states.put(i, left)


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


def _recorded(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Tensor], states: ActivationStore
) -> list[list[_Call]]:
    """What each block is called with, by batch and layer; the states before the first block go into `states`."""
    calls: list[list[_Call]] = []
    known: dict[tuple[int, str], Any] = {}

    def shared(value: Any, key: tuple[int, str]) -> Any:
        """The value met before under a key if it is equal, so that equal tables of many batches are held once."""
        if key in known and _same(known[key], value):
            return known[key]
        known[key] = value
        return value

    def stand_in(layer: int) -> Callable[..., Tensor]:
        def forward(*arguments: Any, **named: Any) -> Tensor:
            hidden: Tensor = arguments[0] if arguments else named.pop("hidden_states")
            if layer == 0:
                states.put(len(calls) - 1, hidden)
            rest = tuple(shared(value, (layer, str(i))) for i, value in enumerate(arguments[1:]))
            calls[-1].append(_Call(rest, {key: shared(value, (layer, key)) for key, value in named.items()}))
            return hidden

        return forward

    try:
        for layer, block in enumerate(blocks):
            block.forward = stand_in(layer)  # on the instance, before the class's own
        for ids in batches:
            calls.append([])
            model.base_model(input_ids=ids.to(states.device), use_cache=False)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return calls


def _finite(tensor: Tensor) -> bool:
    """Whether a tensor with at least one entry holds neither NaN nor Inf, in one pass over it."""
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal: tensors by value, tuples and dicts by their parts, all else by
    identity.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and one.device == other.device
            and torch.equal(one, other)
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        left, right = cast(tuple[Any, ...], one), cast(tuple[Any, ...], other)
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return one is other


def check_weights(model: nn.Module, groups: Groups) -> None:
    """Raise NumericError naming the first weight that is not finite."""
    for here in groups.values():
        _check_finite(model, here, "holds NaN or Inf; repair the model, or add it to ignore")


def _check_finite(model: nn.Module, groups: Sequence[Group], words: str) -> None:
    for group in groups:
        for name in group.names:
            if not _finite(weight_of(model, name)):
                raise NumericError(f"{name}.weight {words}")
