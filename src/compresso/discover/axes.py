"""The axes of a model nobody described: dimensions whose classes leave together, and sub-layers that leave whole.

Rounds of propagation are repeated until nothing more is joined; only then are pins believed. Each family of parameter
dimensions that share classes becomes one axis, or a dimension that stays, with the operation that holds it. What lies
side by side in one dimension that is read, from writers of their own, leaves together where it is equally wide: a
tensor has one axis a dimension.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import torch
from torch import Tensor, nn

from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.discover.flow import Flow, SubLayer
from compresso.discover.labels import Classes, Place, Source
from compresso.discover.rules import Propagation
from compresso.discover.trace import trace
from compresso.errors import ArchError


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """Which unit owns each index of a parameter dimension.

    Args:
        param: qualified parameter name.
        dim: the dimension.
        unit_of: unit of each index, int64; any layout, so that a fused projection can hold a unit's rows in several
            places.
        why: what the operation that brought it in does with it.
    """

    param: str
    dim: int
    unit_of: Tensor
    why: str

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Where the units lie: runs of all units in order, one behind the other; empty if they lie in any other way."""
        size, found, start = int(self.unit_of.max()) + 1, list[Slice](), 0
        while start < len(self.unit_of):
            rest = self.unit_of[start:]
            width = int((rest != 0).nonzero()[0]) if size > 1 and bool((rest != 0).any()) else len(rest)
            if width == 0 or not torch.equal(rest[: size * width], torch.arange(size * width) // width):
                return ()
            found.append(Slice(self.param, self.dim, width, start=start))
            start += size * width
        return tuple(found)

    @property
    def width(self) -> int | None:
        """Entries of one unit if one slice says where they lie, None if it takes several or cannot be said."""
        return slices[0].width if len(slices := self.slices) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An axis as the trace shows it: which entries leave together, in whatever layout;
    `axis` is the same as an `Axis`.
    """

    name: str
    kind: Kind
    size: int
    owners: tuple[Owner, ...]
    whole: tuple[Slice, ...]
    gates: tuple[Gate, ...]
    container: str
    layer: int | None = None
    norms: tuple[str, ...] = ()

    @property
    def axis(self) -> Axis:
        """The axis.

        Raises:
            ArchError: the units lie in a parameter in an order that slices cannot say.
        """
        for owner in self.owners:
            if not owner.slices:
                raise ArchError(f"{self.name}: '{owner.param}' holds its units in no order along dimension {owner.dim}")
        tiled = tuple(piece for owner in self.owners for piece in owner.slices)
        fewest = 1 if self.kind in (Kind.HEAD, Kind.CHANNEL) else 0
        return Axis(
            self.name,
            self.kind,
            self.size,
            tiled + self.whole,
            self.gates,
            self.container,
            self.layer,
            min_units=fewest,
            norms=self.norms,
        )


@dataclass(frozen=True, slots=True)
class Fixed:
    """Parameter dimensions that belong together and have to be kept, and why."""

    sources: tuple[Source, ...]
    size: int
    place: Place
    why: str

    def __str__(self) -> str:
        return f"{self.sources[0][0]} dimension {self.sources[0][1]} stays: at {self.place} {self.why}"


@dataclass(frozen=True, slots=True)
class Discovery:
    """What can be removed from a model, and what cannot."""

    found: tuple[Found, ...]
    fixed: tuple[Fixed, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis.

        Raises:
            ArchError: one cannot be written as an `Axis`; see `Found.axis`.
        """
        return tuple(found.axis for found in self.found)


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
    return Discovery(_named([*found, *_depth(flow.sub_layers, model)]), tuple(fixed))


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
    layer = _layer(container + ".", model)
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


def _depth(sub_layers: tuple[SubLayer, ...], model: nn.Module) -> list[Found]:
    """Axes whose units are whole sub-layers and whole layers, for each list of layers."""
    found: list[Found] = []
    for layers, members in _by_list(sub_layers, model, 0).items():
        size = len(model.get_submodule(layers)._modules)
        owned = {name for _, sub_layer in members for name in (*sub_layer.parameters, *sub_layer.shared)}
        every = {name for name, _ in model.named_parameters() if name.startswith(layers + ".")}
        groups = {
            Kind.LAYER: members if owned == every else [],
            Kind.ATTENTION: [member for member in members if member[1].attends],
            Kind.MLP: [member for member in members if not member[1].attends],
        }
        for kind, chosen in groups.items():
            if chosen:
                leaving = [(i, name) for i, sub_layer in chosen for name in sub_layer.parameters]
                if kind == Kind.LAYER:
                    leaving += dict.fromkeys((i, name) for i, sub_layer in chosen for name in sub_layer.shared)
                whole = tuple(Slice(name, 0, unit=i) for i, name in leaving)
                gates = tuple(Gate(sub_layer.writer, "output", unit=i) for i, sub_layer in chosen)
                found.append(
                    Found(f"{kind}s" if kind == Kind.LAYER else str(kind), kind, size, (), whole, gates, layers)
                )
    return found


def _by_list(sub_layers: Sequence[SubLayer], model: nn.Module, depth: int) -> dict[str, list[tuple[int, SubLayer]]]:
    """List of modules -> the sub-layers in it, each with its index. Where one module of a list holds several of a kind
    it is no layer but a stage, if a list of layers inside holds all of them; a layer may have several, too.

    depth: how many lists lie outside of those that are looked at.
    """
    of_list: dict[str, list[tuple[int, SubLayer]]] = defaultdict(list)
    for sub_layer in sub_layers:
        places = {(_lists(name, model)[depth:] or [None])[0] for name in (*sub_layer.parameters, *sub_layer.shared)}
        place = places.pop()
        if place is not None and not places:
            of_list[place[0]].append((place[1], sub_layer))
    found: dict[str, list[tuple[int, SubLayer]]] = {}
    for layers, members in of_list.items():
        several = Counter((index, sub_layer.attends) for index, sub_layer in members)
        inside = _by_list([one for _, one in members], model, depth + 1) if max(several.values()) > 1 else {}
        found |= inside if _are_layers(inside, len(members)) else {layers: members}
    return found


def _are_layers(inside: Mapping[str, list[tuple[int, SubLayer]]], n: int) -> bool:
    """Whether the lists inside of a module hold all of its n sub-layers, and layers, not the parts of one: a layer has
    both kinds, or all have the same one.
    """
    kinds: dict[tuple[str, int], set[bool]] = defaultdict(set)
    for layers, members in inside.items():
        for index, sub_layer in members:
            kinds[layers, index].add(sub_layer.attends)
    alike = len(set(map(frozenset, kinds.values()))) == 1
    return sum(map(len, inside.values())) == n and (alike or any(len(held) > 1 for held in kinds.values()))


def _lists(name: str, model: nn.Module) -> list[tuple[str, int]]:
    """The lists of modules that a qualified name passes through, from the outermost, and the indices in them."""
    parts = name.split(".")
    paths = [(".".join(parts[:at]), part) for at, part in enumerate(parts) if at and part.isdigit()]
    return [(path, int(part)) for path, part in paths if isinstance(model.get_submodule(path), nn.ModuleList)]


def _layer(name: str, model: nn.Module) -> tuple[str, int] | None:
    """The outermost list of modules that a qualified name passes through, and the index in it."""
    return next(iter(_lists(name, model)), None)


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
