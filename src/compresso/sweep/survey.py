"""One pass over a dense model, block after block, that looks and changes nothing, journalled like a sweep.

Each block runs once on all calibration batches; while it does, what some of its linears read is folded into second
moments, and how far it moves the stream is measured. Tokens may be weighted by 1 / |stream behind the block|^2. Then
errors are shares of the stream, comparable from layer to layer, and the few tokens that attention parks its weight on,
whose states are hundreds of times as large as others, count as one token each and neither rule nor vanish.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.repair import sinks
from compresso.errors import NumericError
from compresso.observe.folds import Stats, merge_, second_moment
from compresso.observe.overflow import finite
from compresso.observe.sites import first_input, first_output
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.block import BlockRunner
from compresso.sweep.calls import recorded_calls
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks
from compresso.training.signals import noted_signals


class Weighting(StrEnum):
    """What a token counts."""

    NONE = "none"
    """One."""
    STREAM = "stream"
    """One over the squared norm of the stream behind the block."""
    SINKS = "sinks"
    """The same, and more where it draws attention; see `compresso.core.repair.sinks`."""


@dataclass
class Seen:
    """What was seen of a block.

    Args:
        moments: linear -> sum of w x x^T over tokens, x being what it reads and a 1 behind it [in + 1, in + 1],
            float32.
        moved: sum of w |out - in|^2.
        tokens: how many.
    """

    moments: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    moved: float = 0.0
    tokens: int = 0


Look = Callable[[int, BlockRunner], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""Looks at a block by its number, which it runs once, keeping its states -> tensors and facts for the journal."""


def look_at(
    model: nn.Module, names: Sequence[str], runner: BlockRunner, weighting: Weighting, ranks: Ranks = ALONE
) -> Seen:
    """Run a block, keeping its states, and fold what some of its linears, by full name, read, over all processes.

    Raises:
        NumericError: NaN or Inf, or a linear that no token reached.
    """
    seen, read = Seen(), dict[str, Tensor]()

    def reads(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            read[name] = first_input(arguments, named).detach()

        return hook

    def ran(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        before = _rows(first_input(arguments, named))
        after = _rows(first_output(output))
        size = _sizes(after, weighting, first_output(output).shape[-2])
        seen.moved += float(((after - before).square().sum(dim=1) * size.square()).double().sum())
        seen.tokens += len(after)
        for name in list(read):
            rows = torch.cat([_rows(read.pop(name)), size.new_ones(len(size), 1)], dim=1) * size.unsqueeze(1)
            seen.moments[name] = second_moment(seen.moments.get(name), rows)

    handles = [model.get_submodule(name).register_forward_pre_hook(reads(name), with_kwargs=True) for name in names]
    handles.append(runner.block.register_forward_hook(ran, with_kwargs=True))
    try:
        with ranks.failing_alike():
            runner.run(keep=True)
    finally:
        for handle in handles:
            handle.remove()
    seen = _of_all(seen, ranks)
    for name in names:
        if name not in seen.moments:
            raise NumericError(f"no calibration token reached {name}; give more examples")
        if not finite(seen.moments[name]):
            raise NumericError(f"{name} reads NaN or Inf: the model overflows on this data; use float32 or bfloat16")
    return seen


def _of_all(seen: Seen, ranks: Ranks) -> Seen:
    """What all processes saw."""
    stats = {name: Stats(moment, seen.tokens) for name, moment in seen.moments.items()}
    merge_(stats, second_moment, ranks)
    told = ranks.told((seen.moved, seen.tokens))
    moments = {name: one.total for name, one in stats.items()}
    return Seen(moments, sum(moved for moved, _ in told), sum(tokens for _, tokens in told))


def _sizes(stream: Tensor, weighting: Weighting, row: int) -> Tensor:
    """Roots of what tokens count [tokens], by the stream [tokens, hidden] behind the block, in rows of `row` tokens;
    hardly any stream at all counts as a thousandth of the median.
    """
    if weighting is Weighting.NONE:
        return stream.new_ones(len(stream))
    energy = stream.square().sum(dim=1)
    found = energy.clamp(min=float(energy.median()) / 1000).rsqrt()
    if weighting is Weighting.SINKS:
        found = found * sinks(energy, row).sqrt()
    return found.masked_fill(~found.isfinite(), 0)


def _rows(states: Tensor) -> Tensor:
    """States of tokens [tokens, width], float32."""
    return states.detach().reshape(-1, states.shape[-1]).float()


@torch.no_grad()
def survey(
    model: PreTrainedModel,
    arch: Arch,
    batches: Sequence[Tensor],
    look: Look,
    journal: Journal,
    *,
    place: Place = "device",
    scratch: Path = Path("activations"),
    offloaded: Offloaded | None = None,
    progress: Progress | None = None,
    name: str = "survey",
    ranks: Ranks = ALONE,
) -> None:
    """Look at every block; the journal then has an entry for each.

    Args:
        model, arch, batches, place, scratch, offloaded, progress, name, ranks: see `compresso.sweep.sweep`.
        look: see `Look`; what it gives is the same in all processes.
        journal: blocks that it has are run, where others behind them need their states, and not looked at.

    Raises:
        NumericError: as `look_at`.
        ResumeError: the journal is another's.
        Interrupted: SIGINT or SIGTERM came, and the journal has what is done.
    """
    blocks = arch.blocks(model)
    done = journal.agreed(range(len(blocks)), ranks)
    if len(done) == len(blocks):
        return
    states = ActivationStore(place, offloaded.device if offloaded else model.device, ranks.own(scratch))
    model.eval()
    shown = progress or Progress("silent")
    tokens, batches = float(sum(batch.numel() for batch in batches)), ranks.mine(batches)
    try:
        with ranks.failing_alike(), offloaded.loaded(offloaded.around(blocks)) if offloaded else nullcontext():
            calls = recorded_calls(model, blocks, batches, states)
        with noted_signals() as requests, shown.running(len(blocks), 0, name):
            for layer, block in enumerate(blocks):
                runner = BlockRunner(block, layer, [of_batch[layer] for of_batch in calls], states)
                with offloaded.loaded(offloaded.of_block(block)) if offloaded else nullcontext():
                    if layer in done:
                        with ranks.failing_alike():
                            runner.run(keep=True)
                    else:
                        found = look(layer, runner)
                        with ranks.failing_alike():
                            if ranks.is_main:
                                journal.write(layer, *found)
                shown.step(layer + 1, name, {}, tokens)
                ranks.obey(requests, str(journal.folder))
    finally:
        states.discard()
