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
from compresso.observe.folds import second_moment
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.block import BlockRunner
from compresso.sweep.calls import recorded_calls
from compresso.sweep.journal import Journal
from compresso.training.progress import Progress
from compresso.training.signals import SIGNALS, Interrupted, noted_signals


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

    Raises:
        NumericError: the stream is not finite somewhere.
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    family, blocks = sliceable(model, arch), arch.blocks(model)
    states = ActivationStore(place, model.device, scratch)
    model.eval()
    shown = progress or Progress("silent")
    done = set(journal.finished(range(len(blocks) + 1))) if journal else set[int]()
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
        calls = recorded_calls(model, blocks, batches, states)
        tokens = float(sum(batch.numel() for batch in batches))
        with noted_signals() as requests, shown.running(len(blocks), 0, name):
            for layer in range(len(blocks) + 1):
                last = layer == len(blocks)
                runner = None if last else BlockRunner(blocks[layer], layer, [call[layer] for call in calls], states)
                if journal and layer in done:
                    read, facts = journal.read(layer)
                    here = {key: one.to(model.device) for key, one in read.items()}
                else:
                    kept, where = (head_width, "before the head") if last else (width, f"before layer {layer}")
                    before, share = basis_of(_moment_of(states), kept, where)
                    here, facts = {"before": before}, {"lost": [share]}
                    if runner is not None:
                        seen = _before_the_ffn(runner, family, before)
                        here["inside"], share = basis_of(seen, width, f"inside layer {layer}")
                        facts["lost"].append(share)
                    if journal:
                        journal.write(layer, here, facts)
                lost += facts["lost"]
                if runner is None:
                    head = here["before"]
                    break
                found += [here["before"], here["inside"]]
                with _hooked(cut_layer(runner.block, family, (here["before"], here["inside"]))):
                    runner.run(keep=True)
                shown.step(layer + 1, name, {}, tokens)
                if requests.arrived:
                    stop = next(signal for signal in reversed(SIGNALS) if signal in requests.arrived)
                    raise Interrupted(stop, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        states.discard()
    assert head is not None
    return Bases(torch.stack(found), head, lost)


def _moment_of(states: ActivationStore) -> Tensor:
    """Second moment of all states, float64."""
    total: Tensor | None = None
    for i in range(len(states)):
        total = second_moment(total, states[i].flatten(0, -2).double())
    assert total is not None
    return total


def _before_the_ffn(runner: BlockRunner, family: Sliceable, before: Tensor) -> Tensor:
    """Second moment, float64, of the stream that a block's FFN would read, behind its attention on the cut stream."""
    total: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        rows = given[0].flatten(0, -2).double()
        total[:] = [second_moment(total[0] if total else None, rows)]

    norm = runner.block.get_submodule(family.mlp.norm)
    with _hooked([*cut_layer(runner.block, family, (before, None)), norm.register_forward_pre_hook(look)]):
        runner.run(keep=False)
    return total[0]


class _hooked:
    """Within the context hooks are on."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
