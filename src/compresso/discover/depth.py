"""Sub-layers and layers that leave whole, by the lists of modules that they lie in; stages are lists of lists."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from compresso.core.axis import Gate, Kind, Slice
from compresso.discover.flow import SubLayer
from compresso.discover.found import Found


def whole_layers(sub_layers: tuple[SubLayer, ...], model: nn.Module) -> list[Found]:
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


def outermost(name: str, model: nn.Module) -> tuple[str, int] | None:
    """The outermost list of modules that a qualified name passes through, and the index in it."""
    return next(iter(_lists(name, model)), None)
