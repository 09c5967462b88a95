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
from compresso.training.ranks import ALONE, Ranks
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

    def store(self, name: str, device: torch.device, ranks: Ranks = ALONE) -> ActivationStore:
        """A store of its own, of this process."""
        return ActivationStore(self.place, device, ranks.own(self.scratch) / name)


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
    ranks: Ranks = ALONE,
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
        ranks: the processes that repair together, each with its copy of both models; each is given all batches, runs
            its share, and fits to the sums over all.

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
    seen, held = ranks.mine(data.seen), ranks.mine(data.held)
    batches = [*seen, *held]
    stores = [data.store(one, device, ranks) for one in ("dense", "smaller", "attention", "mlp")]
    done = journal.agreed(list(by_layer), ranks) if journal else set[int]()
    tokens = float(sum(batch.numel() for batch in (*data.seen, *data.held)))
    notes = dict[str, dict[str, Any]]()
    try:
        with ranks.failing_alike():
            streams = [
                Stream(of, arch, batches, store, one)
                for of, store, one in ((dense, stores[0], known), (smaller, stores[1], None))
            ]
        goals = {Kind.ATTENTION: stores[2], Kind.MLP: stores[3]}
        width = ranks.agreed(int(stores[0][0].shape[-1]) if batches else 0)
        both = Targets(streams[0], streams[1], layers, dimensions, width, len(seen), fit, goals)
        with noted_signals() as requests, shown.running(last + 1, 0, name):
            same = both.same_until()
            with ranks.failing_alike():
                both.leading()
            for layer in range(last + 1):
                wanted = by_layer.get(layer, {})
                looked = {} if layer in done else wanted
                both.look_for_norms(layer, looked, ranks)
                with ranks.failing_alike():
                    both.pass_dense(layer, looked)
                if journal and layer in done:
                    weights, facts = journal.read(layer)
                    for parameter, weight in weights.items():
                        smaller.get_parameter(parameter).copy_(weight)
                else:
                    facts = {one.module: _fitted_(smaller, both, one, loss, ranks) for _, one in sorted(wanted.items())}
                    with ranks.failing_alike():
                        if journal and wanted and ranks.is_main:
                            named = {f"{one.module}.weight" for one in wanted.values()}
                            journal.write(layer, {one: smaller.get_parameter(one) for one in sorted(named)}, facts)
                notes |= facts
                if any(one["applied"] for one in facts.values()):
                    same = min(same, layer)
                if layer < last:
                    with ranks.failing_alike():
                        both.step(layer, as_dense=layer < same)
                shown.step(layer + 1, name, {}, tokens)
                ranks.obey(requests, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        for store in stores:
            store.discard()
    return notes


def _fitted_(
    smaller: PreTrainedModel, both: Targets, one: Consumer, loss: Callable[[], float] | None, ranks: Ranks
) -> dict[str, Any]:
    """Fit one linear in place, to what all processes see; its facts."""
    gap = _absorbed(one)
    told = {"columns": one.columns, "narrower": one.narrower, "absorbs": gap}
    if not both.adds[one.place.layer] and not one.narrower:
        return {"applied": False, **told, "why": "a norm behind it keeps it from absorbing a gap"}
    weight, sums = matrix(smaller, one.module), dict[bool, Moments]()
    with ranks.failing_alike():
        for held, inputs, targets, led_to, row in both.tokens(one):
            weights = token_weights(led_to, row) if both.fit.weighted else torch.ones(len(inputs), device=inputs.device)
            sums[held] = gathered(sums.get(held), inputs, targets, weights)
    of_seen, of_held = (_of_all(sums.get(held), weight, both.fit, ranks) for held in (False, True))
    old = weight.clone()
    try:
        candidates = both.fit.candidates(old, of_seen, of_held)
    except NotPositiveDefiniteError as problem:
        raise NumericError(
            f"{one.module} cannot be repaired: {problem}; give more calibration examples, or use float32"
        ) from problem
    told |= {"tokens": of_seen.tokens}
    missed = error(old, of_held)
    if loss is not None and gap and both.adds[one.place.layer]:
        judged: list[tuple[float, float, Candidate | None]] = [(loss(), missed, None)]
        for candidate in candidates:
            weight.copy_(candidate.weight)
            judged.append((loss(), candidate.missed, candidate))
        best = judged[ranks.agreed(min(range(len(judged)), key=lambda i: judged[i][0]))]
        told |= {"held_out_loss": [judged[0][0], best[0]]}
    else:
        missing = [missed, *(one.missed for one in candidates)]
        chosen = ranks.agreed(missing.index(min(missing)))
        best = (0.0, missing[chosen], candidates[chosen - 1] if chosen else None)
    after, taken = best[1:]
    weight.copy_(old if taken is None else taken.weight)
    ranks.copied_([weight])
    told |= {"applied": taken is not None, "held_out_error": [missed, after]}
    return told if taken is None else {**told, "alpha": taken.alpha, "ridge": taken.ridge}


def _of_all(sums: Moments | None, weight: Tensor, fit: Fit, ranks: Ranks) -> Moments:
    """The sums over all processes, of which some may have had no tokens, for a weight [out, in]."""
    if sums is None:
        out, size = weight.shape
        n = fit.mixes + fit.residual
        cross, energy = weight.new_zeros(n, out, size, dtype=torch.float64), weight.new_zeros(n, dtype=torch.float64)
        sums = Moments(weight.new_zeros(size, size, dtype=torch.float64), cross, energy, 0)
    inputs, cross, energy = (ranks.added_(one) for one in (sums.inputs, sums.cross, sums.energy))
    return Moments(inputs, cross, energy, sum(ranks.told(sums.tokens)))


def _absorbed(one: Consumer) -> str:
    """The gap that a linear makes up for, in the dense model's layers; "" if there is none."""
    if one.until == one.place:
        return ""
    first = Place(one.place.layer, 1) if one.place.sub_layer == 0 else Place(one.place.layer + 1, 0)
    return f"{first.layer}.{first.kind} to {one.until.layer}.{one.until.kind}"
