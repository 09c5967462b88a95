"""The axes of a model nobody described: dimensions whose classes leave together, and sub-layers that leave whole.

Rounds of propagation are repeated until nothing more is joined; only then are pins believed. Each family of parameter
dimensions that share classes becomes one axis, or a dimension that stays, with the operation that holds it. What lies
side by side in one dimension that is read, from writers of their own, leaves together where it is equally wide: a
tensor has one axis a dimension.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import torch
from torch import Tensor, nn

from compresso.core.axis import Gate, Kind
from compresso.discover.depth import outermost, whole_layers
from compresso.discover.flow import Flow
from compresso.discover.found import Discovery, Fixed, Found, Owner
from compresso.discover.labels import Classes, Place, Source
from compresso.discover.rules import Propagation
from compresso.discover.trace import trace


@dataclass
class _Family:
    """Parameter dimensions that share classes."""

    sources: list[Source] = field(default_factory=list[Source])
    classes: set[int] = field(default_factory=set[int])


def discover(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Discovery:
    """The axes of a model, from a trace of one forward; weights are not read, so the meta device will do.

    inputs: example inputs, if the model is not one of transformers that reads tokens or images; only their shapes are
    used.

    Raises:
        ArchError: naming module and operation, if the forward has an operation whose dependencies are not known.
    """
    traced = trace(model, inputs)
    flow = Flow(traced, model)
    classes = Classes()
    for number, name in traced.parameters.items():
        classes.add(name, traced.shapes[number])
    while True:
        classes.begin()
        round_ = Propagation(traced, classes, flow.is_rms_norm)
        round_.run()
        if not classes.merge() and not _tied_side_by_side(classes):
            break
    stream = {
        int(c) for n in flow.residual_sums if isinstance(v := round_.values.get(n), Tensor) for c in torch.unique(v)
    } - {0}
    found: list[Found] = []
    fixed: list[Fixed] = []
    reasons = _reasons(classes)
    for family in _families(classes):
        made = _axis(family, classes, reasons, stream, flow)
        (found if isinstance(made, Found) else fixed).append(made)  # type: ignore[arg-type]
    return Discovery(_named([*found, *whole_layers(flow.sub_layers, model)]), tuple(fixed))


def _reasons(classes: Classes) -> dict[int, tuple[Place, str]]:
    """The first reason for which each pinned class stays."""
    reasons: dict[int, tuple[Place, str]] = {}
    for pinned, place, why in classes.pins:
        for c in pinned.tolist():
            reasons.setdefault(c, (place, why))
    return reasons


def _families(classes: Classes) -> list[_Family]:
    """Group parameter dimensions by shared classes."""
    family_of: dict[int, _Family] = {}
    for source in classes.first:
        mine = set(classes.of(source).tolist())
        merged = _Family([source], mine)
        for other in {id(f): f for c in mine if (f := family_of.get(c)) is not None}.values():
            merged = _Family(other.sources + merged.sources, other.classes | merged.classes)
        for c in merged.classes:
            family_of[c] = merged
    return list({id(family): family for family in family_of.values()}.values())


def _tied_side_by_side(classes: Classes) -> bool:
    """Join the units of equally wide runs that one dimension holds side by side, each with a writer of its own; whether
    there were any.
    """
    for source in classes.reads:
        along_it = classes.of(source)
        writers = {tuple(own): other for other in classes.writes if len(own := classes.of(other).tolist()) > 1}
        width = next((len(own) for own in writers if own[0] == int(along_it[0])), 0)
        if not width or len(along_it) <= width or len(along_it) % width:
            continue
        runs = along_it.reshape(-1, width)
        together = [tuple(run) for run in runs.tolist()]
        if len(set(together)) == len(together) and all(run in writers for run in together):
            classes.join(runs[:1].expand_as(runs), runs)
    return classes.merge()


def _axis(
    family: _Family, classes: Classes, reasons: Mapping[int, tuple[Place, str]], stream: set[int], flow: Flow
) -> Found | Fixed:
    """One family as an axis, or what holds it."""
    sources, model = tuple(family.sources), flow.model
    units = list(dict.fromkeys(c for source in sources for c in classes.of(source).tolist()))

    def stays(place: Place, why: str) -> Fixed:
        return Fixed(sources, len(units), place, why)

    if held := next((reasons[c] for c in units if c in reasons), None):
        return stays(*held)
    written = [source for source in sources if source in classes.writes]
    read = [source for source in sources if source in classes.reads]
    attended = {int(c) for labels in classes.attended for c in labels}
    heads = not attended.isdisjoint(units)
    if not written or not read:
        return stays(
            Place(sources[0][0].rpartition(".")[0], "parameter"), "nothing reads it" if written else "nothing writes it"
        )
    if len(units) == 1 and not heads:
        return stays(classes.writes[written[0]], "all its entries leave together")
    order = torch.full((len(classes.canonical),), -1)
    order[torch.tensor(units)] = torch.arange(len(units))
    owners = tuple(Owner(*source, order[classes.of(source)], _why(source, classes)) for source in sources)
    if any(len(torch.unique(owner.unit_of.bincount(minlength=len(units)))) > 1 for owner in owners):
        return stays(classes.writes[written[0]], "its units differ in size")
    kind = Kind.HEAD if heads else Kind.CHANNEL if stream.isdisjoint(units) else Kind.HIDDEN
    if kind != Kind.HIDDEN and (
        folded := next((p for labels, p in classes.norms if not set(labels.tolist()).isdisjoint(units)), None)
    ):
        return stays(folded, "it is averaged over, and masks are put only behind that")
    norms = tuple(
        dict.fromkeys(place.module for labels, place in classes.norms if not set(labels.tolist()).isdisjoint(units))
    )
    side, ends, places = ("output", written, classes.writes) if kind == Kind.HIDDEN else ("input", read, classes.reads)
    owning = {(owner.param, owner.dim): owner for owner in owners}
    gates = tuple(
        {
            (gate.module, gate.start): gate
            for end in ends
            if end in places
            for gate in _gates(places[end].module, side, owning[end], len(units))
        }.values()
    )
    if outside := next((gate for gate in gates if not flow.is_leaf(gate.module)), None):
        return stays(
            Place(outside.module, "parameter"),
            "no module of its own computes with it, so there is nowhere to put a mask",
        )
    container = _common([source[0].rpartition(".")[0] for source in sources])
    if kind == Kind.HIDDEN and not container:
        container = str(getattr(model, "base_model_prefix", ""))
    layer = outermost(container + ".", model)
    return Found(container, kind, len(units), owners, (), gates, container, layer[1] if layer else None, norms)


def _gates(module: str, side: Literal["input", "output"], owner: Owner, size: int) -> list[Gate]:
    """Where a mask of so many units meets what a module reads or writes: once, or at each of several runs of units."""
    n, slices = len(owner.unit_of), owner.slices
    if side == "output" or len(slices) < 2:
        return [Gate(module, side, owner.width or n // size)]
    return [Gate(module, side, piece.width, start=piece.start, of=n) for piece in slices]


def _why(source: Source, classes: Classes) -> str:
    """What the model does with a parameter dimension."""
    if source in classes.reads:
        return f"read at {classes.reads[source]}"
    return f"written at {classes.writes[source]}" if source in classes.writes else "scales or shifts the same entries"


def _common(modules: list[str]) -> str:
    """The innermost module that holds all of these."""
    paths = [PurePosixPath(name.replace(".", "/")) for name in modules]
    first = paths[0]
    for parent in (first, *first.parents):
        if all(path.is_relative_to(parent) for path in paths):
            return "" if str(parent) == "." else str(parent).replace("/", ".")
    return ""


_ORDER = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER, Kind.ATTENTION, Kind.MLP)
_WORDS = {Kind.HEAD: "heads", Kind.CHANNEL: "channels"}


def _named(found: list[Found]) -> tuple[Found, ...]:
    """The same axes under readable names: `layers.3.heads`, `hidden`;
    a number tells apart what would be called alike.
    """
    taken: dict[str, int] = defaultdict(int)
    named: list[Found] = []
    for one in sorted(found, key=lambda f: (f.layer is None, f.layer or 0, _ORDER.index(f.kind))):
        if one.kind in _WORDS:
            word = _WORDS[one.kind]
            name = (
                f"layers.{one.layer}.{word}"
                if one.layer is not None
                else f"{one.container}.{word}"
                if one.container
                else word
            )
        else:
            name = str(one.kind) if one.kind == Kind.HIDDEN else one.name
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}.{taken[name]}"
        named.append(
            Found(name, one.kind, one.size, one.owners, one.whole, one.gates, one.container, one.layer, one.norms)
        )
    return tuple(named)
