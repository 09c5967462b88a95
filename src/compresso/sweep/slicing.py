"""The bases to which a stream is cut, found block after block, each on what the blocks cut before it give.

Of one block: the stream before it is cut and the attention runs, which gives the stream before the FFN; cut in turn,
that gives the stream behind the block. Both are seen whole, and the moments are float64 (SliceGPT, arXiv 2401.15024,
algorithm 1). Nothing is edited: a cut is hooks of `compresso.edit.slice_stream`, put on the block that runs. The
journal keeps the bases of finished blocks, so that a killed run goes on to the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.sliceable import Sliceable, sliceable
from compresso.core.slicing import principal
from compresso.edit.slice_stream import cut_layer
from compresso.errors import NumericError
from compresso.observe.folds import Stats, merge_, second_moment
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.block import BlockRunner
from compresso.sweep.calls import recorded_calls
from compresso.sweep.journal import Journal
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks
from compresso.training.signals import noted_signals


@dataclass(frozen=True)
class Bases:
    """Where a stream is cut, and what of it is lost.

    Args:
        bases: before the attention and the FFN of each layer [2 layers, hidden, width], float32, columns orthonormal.
        head: before the last norm [hidden, head width], likewise.
        lost: share of the squared norm of the stream that each cut takes, those of `bases` in their order, then that of
            `head`.
    """

    bases: Tensor
    head: Tensor
    lost: Sequence[float]


@torch.no_grad()
def bases_of(
    model: PreTrainedModel,
    arch: Arch,
    batches: Sequence[Tensor],
    width: int,
    head_width: int,
    damping: float,
    *,
    place: Place = "device",
    scratch: Path = Path("activations"),
    journal: Journal | None = None,
    progress: Progress | None = None,
    name: str = "slicing",
    ranks: Ranks = ALONE,
) -> Bases:
    """Find the bases of a model's stream; the model is left as it is.

    Args:
        model: dense.
        arch: knows its blocks.
        batches: ids [rows, seq] each, of rows that need no padding.
        width, head_width: dimensions that stay, before each half of a layer and before the head.
        damping: see `compresso.core.slicing.principal`.
        place, scratch: where the states between two blocks are kept, and the folder for "disk".
        journal: of finished blocks; entry i holds the bases before block i, the last one that before the head.
        progress, name: display.
        ranks: the processes that look together; each is given all batches, and runs its share.

    Raises:
        NumericError: the stream is not finite somewhere.
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    family, blocks = sliceable(model, arch), arch.blocks(model)
    states = ActivationStore(place, model.device, ranks.own(scratch))
    model.eval()
    shown = progress or Progress("silent")
    done = journal.agreed(range(len(blocks) + 1), ranks) if journal else set[int]()
    found: list[Tensor] = []
    lost: list[float] = []
    head: Tensor | None = None

    def basis_of(moment: Tensor, kept: int, where: str) -> tuple[Tensor, float]:
        try:
            directions = principal(moment, damping, family.layer_norm)
        except ValueError as error:
            raise NumericError(f"the stream {where} cannot be cut: {error}") from error
        return directions.basis[:, :kept].float().contiguous(), directions.lost(kept)

    try:
        tokens, batches = float(sum(batch.numel() for batch in batches)), ranks.mine(batches)
        with ranks.failing_alike():
            calls = recorded_calls(model, blocks, batches, states)
        with noted_signals() as requests, shown.running(len(blocks), 0, name):
            for layer in range(len(blocks) + 1):
                last = layer == len(blocks)
                runner = None if last else BlockRunner(blocks[layer], layer, [call[layer] for call in calls], states)
                if journal and layer in done:
                    read, facts = journal.read(layer)
                    here = {key: one.to(model.device) for key, one in read.items()}
                else:
                    kept, where = (head_width, "before the head") if last else (width, f"before layer {layer}")
                    before, share = basis_of(_moment_of(states, ranks), kept, where)
                    here, facts = {"before": before}, {"lost": [share]}
                    if runner is not None:
                        seen = _before_the_ffn(runner, family, before, ranks)
                        here["inside"], share = basis_of(seen, width, f"inside layer {layer}")
                        facts["lost"].append(share)
                    ranks.copied_(here.values())
                    with ranks.failing_alike():
                        if journal and ranks.is_main:
                            journal.write(layer, here, facts)
                lost += facts["lost"]
                if runner is None:
                    head = here["before"]
                    break
                found += [here["before"], here["inside"]]
                cut = cut_layer(runner.block, family, (here["before"], here["inside"]))
                with ranks.failing_alike(), _hooked(cut):
                    runner.run(keep=True)
                shown.step(layer + 1, name, {}, tokens)
                ranks.obey(requests, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        states.discard()
    assert head is not None
    return Bases(torch.stack(found), head, lost)


def _moment_of(states: ActivationStore, ranks: Ranks) -> Tensor:
    """Second moment of all states of all processes, float64."""
    seen: dict[str, Stats] = {}
    for i in range(len(states)):
        _add(seen, states[i].flatten(0, -2))
    merge_(seen, second_moment, ranks)
    return seen[_STREAM].total


def _before_the_ffn(runner: BlockRunner, family: Sliceable, before: Tensor, ranks: Ranks) -> Tensor:
    """Second moment over all processes, float64, of the stream that a block's FFN would read, behind its attention on
    the cut stream.
    """
    seen: dict[str, Stats] = {}

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        _add(seen, given[0].flatten(0, -2))

    norm = runner.block.get_submodule(family.mlp.norm)
    hooks = [*cut_layer(runner.block, family, (before, None)), norm.register_forward_pre_hook(look)]
    with ranks.failing_alike(), _hooked(hooks):
        runner.run(keep=False)
    merge_(seen, second_moment, ranks)
    return seen[_STREAM].total


_STREAM = "stream"


def _add(seen: dict[str, Stats], rows: Tensor) -> None:
    """Fold rows [tokens, hidden] into what was seen."""
    before = seen.get(_STREAM)
    total = second_moment(None if before is None else before.total, rows.double())
    seen[_STREAM] = Stats(total, len(rows) + (0 if before is None else before.n))


class _hooked:
    """Within the context hooks are on."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
