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
and blocks behind the last such linear are not run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.repair import Moments, error, gathered, refitted, token_weights
from compresso.errors import NumericError
from compresso.sweep.activation_store import ActivationStore
from compresso.sweep.activation_store import Place as Where
from compresso.sweep.journal import Journal
from compresso.sweep.lost import Consumer, Lost, Place
from compresso.sweep.targets import matrix
from compresso.sweep.two_streams import Stream, cut, lifted
from compresso.training.progress import Progress
from compresso.training.signals import noted_signals


@dataclass(frozen=True)
class Fit:
    """How one linear is fitted.

    Args:
        residual: whether y* is that of the dense stream; else of the dense sub-layer alone.
        alphas: shares of the residual target to try.
        ridges: to try.
        weighted: whether a token counts by one over its squared target norm; else all count alike.
        to_old: whether the ridge pulls to the old weight; else to zero.
    """

    residual: bool = True
    alphas: Sequence[float] = (0.0, 0.5, 1.0)
    ridges: Sequence[float] = (0.03, 0.3, 3.0)
    weighted: bool = True
    to_old: bool = True

    @property
    def mixes(self) -> bool:
        """Whether the dense sub-layer's own target is needed."""
        return not self.residual or any(alpha < 1 for alpha in self.alphas)

    def candidates(self, old: Tensor, seen: Moments, held: Moments) -> list["Candidate"]:
        """For each ridge the fitted weight whose mixture misses the held-out targets least.

        Raises NotPositiveDefiniteError.
        """
        start = old if self.to_old else torch.zeros_like(old)
        found: list[Candidate] = []
        for ridge in self.ridges:
            of_ridge: list[Candidate] = []
            for alpha in self.alphas if self.residual else (0.0,):
                weight = refitted(start, seen.inputs, seen.cross_of(alpha), ridge).to(old.dtype)
                of_ridge.append(Candidate(weight, alpha, ridge, error(weight, held)))
            found.append(min(of_ridge, key=lambda one: one.missed))
        return found


@dataclass(frozen=True)
class Candidate:
    """A weight that may take the old one's place.

    Args:
        weight: [out, in], in the old one's dtype.
        alpha, ridge: it was fitted with.
        missed: its relative error on held-out tokens.
    """

    weight: Tensor
    alpha: float
    ridge: float
    missed: float


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


@dataclass
class _Repair:
    """The two streams, at the smaller model's block that is next, and what the dense stream was behind its places."""

    dense: Stream
    smaller: Stream
    layers: Sequence[int]
    kept: Sequence[int] | None
    width: int
    n_seen: int
    fit: Fit
    goals: Mapping[Kind, ActivationStore]
    at: int = 0
    adds: dict[int, bool] = field(default_factory=dict[int, bool])

    def leading(self) -> None:
        """Run what left before the first block that is left."""
        while self.at < self.layers[0]:
            self.dense.step(self.at)
            self.at += 1

    def pass_dense(self, layer: int, wanted: Mapping[Kind, Consumer]) -> None:
        """Run the dense block and the gap behind it, noting the streams that are wanted of them."""
        own = self.layers[layer]
        following = self.layers[layer + 1] if layer + 1 < len(self.layers) else len(self.dense.blocks)
        self.adds[own] = not wanted or self.dense.is_sum(own, 0, self.dense.states[0])
        for index in range(len(self.dense)):
            hidden = self.dense.states[index]
            beyond = [one for one in wanted.values() if self.adds[own] and one.until.layer >= following]
            for at in range(own, following):
                output, written = self.dense.run(at, index, hidden)
                for kind, one in wanted.items():
                    if not self.adds[own]:
                        if at == own:
                            self.goals[kind].put(index, written.outputs[kind])
                    elif one.until.layer == at:
                        behind = output if one.until.kind is Kind.MLP else hidden + written.outputs[one.until.kind]
                        self.goals[kind].put(index, behind)
                hidden = output
            self.dense.states.put(index, hidden)
            for one in beyond:  # sub-layers of blocks that are left are gone, too
                self.goals[one.place.kind].put(index, self._followed(index, hidden, following, one.until))
        self.at = following

    def tokens(self, one: Consumer) -> Iterator[tuple[bool, Tensor, list[Tensor]]]:
        """Whether a batch is held out, x~ [tokens, in] and y* [tokens, out] of each target, batch by batch."""
        kind, own = one.place.kind, one.place.layer
        bias = getattr(self.smaller.linear(one.layer, kind), "bias", None)
        constant = bias.float() if isinstance(bias, Tensor) else 0.0
        adds = self.adds[own]
        for index in range(len(self.smaller)):
            hidden = self.smaller.states[index]
            until = kind if kind is Kind.ATTENTION or not adds else None
            output, written = self.smaller.run(one.layer, index, hidden, until=until)
            if not adds:
                already: Tensor | float = 0.0
            elif kind is Kind.ATTENTION:
                already = hidden.float()
            else:
                already = output.float() - written.outputs[kind].float()
            goals: list[Tensor] = []
            if self.fit.mixes:
                forced = None
                if kind is Kind.MLP:
                    attention = written.outputs.get(Kind.ATTENTION)
                    forced = torch.zeros_like(hidden) if attention is None else attention
                goals.append(self._made_of(one, index, hidden, forced))
            if self.fit.residual:
                goals.append(cut(self.goals[kind][index], self.kept))
            wanted = [(goal.float() - already - constant).flatten(0, -2) for goal in goals]
            yield index >= self.n_seen, written.inputs[kind].flatten(0, -2), wanted

    def _made_of(self, one: Consumer, index: int, hidden: Tensor, forced: Tensor | None) -> Tensor:
        """The stream at a consumer's last place, made by the dense blocks of the smaller model's stream."""
        own = one.place.layer
        hidden = lifted(hidden, self.kept, self.width)
        forced = None if forced is None else lifted(forced, self.kept, self.width)
        if self.adds[own]:
            return cut(self._followed(index, hidden, own, one.until, forced), self.kept)
        _, written = self.dense.run(own, index, hidden, until=one.place.kind, forced=forced)
        return cut(written.outputs[one.place.kind], self.kept)

    def _followed(self, index: int, hidden: Tensor, first: int, until: Place, forced: Tensor | None = None) -> Tensor:
        """The stream behind a place, made by the dense blocks from the first on.

        forced: what the first one's attention is to have written.
        """
        for at in range(first, until.layer + 1):
            last = Kind.ATTENTION if at == until.layer and until.kind is Kind.ATTENTION else None
            output, written = self.dense.run(at, index, hidden, last, forced if at == first else None)
            hidden = hidden + written.outputs[last] if last else output
        return hidden


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
    loss: Callable[[], float],
    *,
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
        loss: of the smaller model as it is, on what is held out.
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
        streams = [Stream(of, arch, batches, store) for of, store in ((dense, stores[0]), (smaller, stores[1]))]
        goals = {Kind.ATTENTION: stores[2], Kind.MLP: stores[3]}
        width = int(stores[0][0].shape[-1])
        both = _Repair(streams[0], streams[1], layers, dimensions, width, len(data.seen), fit, goals)
        with noted_signals() as requests, shown.running(last + 1, 0, name):
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
                if layer < last:
                    both.smaller.step(layer)
                shown.step(layer + 1, name, {}, tokens)
                requests.obey(str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        for store in stores:
            store.discard()
    return notes


def _fitted_(smaller: PreTrainedModel, both: _Repair, one: Consumer, loss: Callable[[], float]) -> dict[str, Any]:
    """Fit one linear in place; its facts."""
    gap = _absorbed(one)
    told = {"columns": one.columns, "narrower": one.narrower, "absorbs": gap}
    if not both.adds[one.place.layer] and not one.narrower:
        return {"applied": False, **told, "why": "a norm behind it keeps it from absorbing a gap"}
    sums: dict[bool, Moments] = {}
    for held, inputs, targets in both.tokens(one):
        weights = token_weights(targets[-1]) if both.fit.weighted else torch.ones(len(inputs), device=inputs.device)
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
    if gap and both.adds[one.place.layer]:
        judged: list[tuple[float, float, Candidate | None]] = [(loss(), missed, None)]
        for candidate in candidates:
            weight.copy_(candidate.weight)
            judged.append((loss(), candidate.missed, candidate))
        best = min(judged, key=lambda one: one[0])
        told |= {"held_out_loss": [judged[0][0], best[0]]}
    else:
        least = min(candidates, key=lambda one: one.missed)
        best = (0.0, missed, None) if missed <= least.missed else (0.0, least.missed, least)
    _, after, taken = best
    weight.copy_(old if taken is None else taken.weight)
    told |= {"applied": taken is not None, "held_out_error": [missed, after]}
    return told if taken is None else {**told, "alpha": taken.alpha, "ridge": taken.ridge}


def _absorbed(one: Consumer) -> str:
    """The gap that a linear makes up for, in the dense model's layers; "" if there is none."""
    if one.until == one.place:
        return ""
    first = Place(one.place.layer, 1) if one.place.sub_layer == 0 else Place(one.place.layer + 1, 0)
    return f"{first.layer}.{first.kind} to {one.until.layer}.{one.until.kind}"
