"""Repair of a smaller model: what lost inputs, or stands before a gap, is fitted to the dense model, block after block.

Both models run on the same tokens, the smaller one with the repaired blocks before it. At each linear that is to be
fitted (`compresso.sweep.lost`), x~ is what it reads in the smaller model, and y* one of

    residual  (the dense stream behind the place, or behind the gap that follows it) - (the smaller one's stream there,
              without what the linear adds): what puts the stream back onto the dense one
    input     (what the dense sub-layer, and the dense blocks of the gap, make of the smaller model's stream) - the same

Where a norm stands between the linear and the stream (Gemma 2, BERT) neither stream can be reached by adding: there y*
is what the dense linear itself writes, and a gap is not absorbed.

Some windows are held out. For each ridge, the mixture is taken whose fit misses their y* least. Of the ridges, a linear
that lost inputs takes the one that misses it least, and keeps its old weight if that misses it less. A linear before a
gap, of which there are few and whose target is far away, takes the one with the lowest loss of the whole model, or
keeps its weight if that has a lower one. `compresso.core.repair` has the mathematics. Only what feeds a gap is fitted,
and blocks behind the last such linear are not run. Blocks before the first change are run once, for both models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.repair import Moments, error, gathered, token_weights
from compresso.errors import NumericError
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.activation_store import Place as Where
from compresso.sweep.journal import Journal
from compresso.sweep.least_squares import Candidate, Fit
from compresso.sweep.lost import Consumer, Lost, Place
from compresso.sweep.repair_targets import Targets
from compresso.sweep.targets import matrix
from compresso.sweep.two_streams import Known, Stream
from compresso.training.progress import Progress
from compresso.training.signals import noted_signals


@dataclass(frozen=True)
class Calibrated:
    """What a repair is calibrated on, and where states are kept.

    Args:
        seen: ids [rows, seq] of batches that are fitted to.
        held: those of batches that are held out.
        place, scratch: of the states between two blocks, and the folder for "disk".
    """

    seen: Sequence[Tensor]
    held: Sequence[Tensor]
    place: Where = "device"
    scratch: Path = Path("activations")

    def store(self, name: str, device: torch.device) -> ActivationStore:
        """A store of its own."""
        return ActivationStore(self.place, device, self.scratch / name)


@torch.no_grad()
def repair_(
    dense: PreTrainedModel,
    smaller: PreTrainedModel,
    arch: Arch,
    gone: Lost,
    layers: Sequence[int],
    dimensions: Sequence[int] | None,
    data: Calibrated,
    fit: Fit,
    loss: Callable[[], float] | None,
    *,
    known: Known | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
    name: str = "repair",
) -> dict[str, dict[str, Any]]:
    """Fit the linears that lost inputs or stand before a gap.

    Args:
        dense: as it was, on the device of the smaller one.
        smaller: repaired in place.
        arch: describes both.
        gone: what left.
        layers: the dense model's number of each of the smaller one's blocks.
        dimensions: of the dense stream, those that are left; None for all.
        data: the tokens.
        fit: how.
        loss: of the smaller model as it is, on what is held out; None takes the fit that misses its own held-out
            targets least before a gap, too, which saves two passes or more a gap.
        known: of the dense model on these tokens, for repairs of several models; None keeps nothing.
        journal: of finished blocks, which are read instead of done; None keeps none.
        progress, name: display.

    Returns:
        Facts of each linear by its name.

    Raises:
        NumericError: NaN or Inf in either model, or in a fit.
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    by_layer: dict[int, dict[Kind, Consumer]] = {}
    for one in gone.consumers:
        by_layer.setdefault(one.layer, {})[one.place.kind] = one
    if not by_layer:
        return {}
    shown, last, device = progress or Progress("silent"), max(by_layer), smaller.device
    batches = [*data.seen, *data.held]
    stores = [data.store(one, device) for one in ("dense", "smaller", "attention", "mlp")]
    done = set(journal.finished(list(by_layer))) if journal else set[int]()
    tokens, notes = float(sum(batch.numel() for batch in batches)), dict[str, dict[str, Any]]()
    try:
        streams = [
            Stream(of, arch, batches, store, one)
            for of, store, one in ((dense, stores[0], known), (smaller, stores[1], None))
        ]
        goals = {Kind.ATTENTION: stores[2], Kind.MLP: stores[3]}
        width = int(stores[0][0].shape[-1])
        both = Targets(streams[0], streams[1], layers, dimensions, width, len(data.seen), fit, goals)
        with noted_signals() as requests, shown.running(last + 1, 0, name):
            same = both.same_until()
            both.leading()
            for layer in range(last + 1):
                wanted = by_layer.get(layer, {})
                both.pass_dense(layer, {} if layer in done else wanted)
                if journal and layer in done:
                    weights, facts = journal.read(layer)
                    for parameter, weight in weights.items():
                        smaller.get_parameter(parameter).copy_(weight)
                else:
                    facts = {one.module: _fitted_(smaller, both, one, loss) for _, one in sorted(wanted.items())}
                    if journal and wanted:
                        named = {f"{one.module}.weight" for one in wanted.values()}
                        journal.write(layer, {one: smaller.get_parameter(one) for one in sorted(named)}, facts)
                notes |= facts
                if any(one["applied"] for one in facts.values()):
                    same = min(same, layer)
                if layer < last:
                    both.step(layer, as_dense=layer < same)
                shown.step(layer + 1, name, {}, tokens)
                requests.obey(str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        for store in stores:
            store.discard()
    return notes


def _fitted_(
    smaller: PreTrainedModel, both: Targets, one: Consumer, loss: Callable[[], float] | None
) -> dict[str, Any]:
    """Fit one linear in place; its facts."""
    gap = _absorbed(one)
    told = {"columns": one.columns, "narrower": one.narrower, "absorbs": gap}
    if not both.adds[one.place.layer] and not one.narrower:
        return {"applied": False, **told, "why": "a norm behind it keeps it from absorbing a gap"}
    sums: dict[bool, Moments] = {}
    for held, inputs, targets, led_to, row in both.tokens(one):
        weights = token_weights(led_to, row) if both.fit.weighted else torch.ones(len(inputs), device=inputs.device)
        sums[held] = gathered(sums.get(held), inputs, targets, weights)
    weight = matrix(smaller, one.module)
    old = weight.clone()
    try:
        candidates = both.fit.candidates(old, sums[False], sums[True])
    except NotPositiveDefiniteError as problem:
        raise NumericError(
            f"{one.module} cannot be repaired: {problem}; give more calibration examples, or use float32"
        ) from problem
    told |= {"tokens": sums[False].tokens}
    missed = error(old, sums[True])
    if loss is not None and gap and both.adds[one.place.layer]:
        judged: list[tuple[float, float, Candidate | None]] = [(loss(), missed, None)]
        for candidate in candidates:
            weight.copy_(candidate.weight)
            judged.append((loss(), candidate.missed, candidate))
        best = min(judged, key=lambda one: one[0])
        told |= {"held_out_loss": [judged[0][0], best[0]]}
    else:
        least = min(candidates, key=lambda one: one.missed)
        best = (0.0, missed, None) if missed <= least.missed else (0.0, least.missed, least)
    after, taken = best[1:]
    weight.copy_(old if taken is None else taken.weight)
    told |= {"applied": taken is not None, "held_out_error": [missed, after]}
    return told if taken is None else {**told, "alpha": taken.alpha, "ridge": taken.ridge}


def _absorbed(one: Consumer) -> str:
    """The gap that a linear makes up for, in the dense model's layers; "" if there is none."""
    if one.until == one.place:
        return ""
    first = Place(one.place.layer, 1) if one.place.sub_layer == 0 else Place(one.place.layer + 1, 0)
    return f"{first.layer}.{first.kind} to {one.until.layer}.{one.until.kind}"
