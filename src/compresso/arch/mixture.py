"""One mixture of experts as transformers holds it, read off its modules: a router, experts stacked in two tensors, and
perhaps a shared expert that every token takes.

    gate_up_proj [experts, 2 x width, hidden], down_proj [experts, hidden, width]; gpt-oss has them transposed, with
    gate and up by turns and with biases. Checkpoints hold a tensor an expert; transformers stacks and unstacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.routers import CORRECTION, ROUTERS, routing_of
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Group, Weight
from compresso.core.routing import Routing
from compresso.errors import ArchError

EXPERTS = "experts"
"""The module of a mixture that holds its experts."""
SHARED = ("shared_expert", "shared_experts")
"""What families call the expert of all tokens."""
_SHARED_GATE = "shared_expert_gate"
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixture of one layer.

    Args:
        where: its qualified name.
        router: what its router is called.
        shared: what its shared expert is called; None without.
        experts, width, hidden: how many experts, and their widths.
        transposed: whether its stacks are [experts, in, out].
        tensors: shapes of its parameters, by name within it.
        routing: what its router does.
    """

    where: str
    router: str
    shared: str | None
    experts: int
    width: int
    hidden: int
    transposed: bool
    tensors: dict[str, tuple[int, ...]]
    routing: Routing

    @property
    def down(self) -> str:
        """The stack that writes to the stream."""
        return f"{self.where}.{EXPERTS}.down_proj"

    def folds(self) -> tuple[tuple[str, int], ...]:
        """(parameter, dim) of the entries that its output is made of."""
        found = [(self.down, 2 if self.transposed else 1)]
        if f"{EXPERTS}.down_proj_bias" in self.tensors:
            found.append((f"{self.down}_bias", 1))
        if self.shared:
            found.append((f"{self.where}.{self.shared}.down_proj.weight", 0))
        return tuple(found)

    def stream(self) -> Iterator[Slice]:
        """What of its parameters lies along the stream."""
        for name in self.tensors:
            own, full = name.rpartition(".")[2], f"{self.where}.{name}"
            if own == "gate_up_proj":
                yield Slice(full, 1 if self.transposed else 2)
            elif own == "down_proj":
                yield Slice(full, 2 if self.transposed else 1)
            elif own == "down_proj_bias":
                yield Slice(full, 1)
            elif own == "weight":
                yield Slice(full, 0 if ".down_proj." in name else 1)

    def experts_axis(self, layer: int) -> Axis:
        """One routed expert a unit."""
        router = f"{self.where}.{self.router}"
        slices = [Slice(f"{self.where}.{n}", 0) for n in self.tensors if n.partition(".")[0] in (EXPERTS, self.router)]
        scaled = [(f"{self.where}.{n}", 0) for n in self.tensors if n.startswith(f"{EXPERTS}.down_proj")]
        return Axis(
            name=f"layers.{layer}.experts",
            kind=Kind.EXPERT,
            size=self.experts,
            slices=tuple(slices),
            gates=(Gate(router, "route", folds=tuple(scaled)),),
            container=self.where,
            layer=layer,
            min_units=self.routing.fewest,
            groups=self.routing.groups,
            buffers=(f"{router}.{CORRECTION}",) if self.routing.sigmoid else (),
        )

    def channels_axis(self, layer: int) -> Axis:
        """A unit is the channel of one number in every expert: these are stacked, so that all keep as many."""
        gate_up, dim = f"{self.where}.{EXPERTS}.gate_up_proj", 2 if self.transposed else 1
        halves = (0,) if self.transposed else (0, self.width)  # by turns, or one behind the other
        wide = 2 if self.transposed else 1
        slices = [Slice(gate_up, dim, wide, start=start) for start in halves]
        if f"{EXPERTS}.gate_up_proj_bias" in self.tensors:
            slices += [Slice(f"{gate_up}_bias", 1, wide, start=start) for start in halves]
        read = (self.down, 1 if self.transposed else 2)
        return Axis(
            name=f"layers.{layer}.expert_channels",
            kind=Kind.EXPERT_CHANNEL,
            size=self.width,
            slices=(*slices, Slice(*read)),
            gates=(Gate(f"{self.where}.{EXPERTS}", "weights", folds=(read,)),),
            container=self.where,
            layer=layer,
            min_units=1,
        )

    def weight(self, name: str) -> Weight:
        """How one of its parameters, by its name within it, is counted."""
        own = name.rpartition(".")[2]
        stacked = name.partition(".")[0] == EXPERTS
        return Weight(
            f"{self.where}.{name}",
            self.tensors[name],
            Group.BLOCKS,
            macs=int(own == "weight" or own in _STACKS),
            routed=self.routing.top_k if stacked else 0,
        )


def mixture_of(model: PreTrainedModel, where: str, hidden: int) -> Mixture | None:
    """The mixture at a name; None if a single FFN is there.

    Args:
        model: that holds it.
        where: qualified name of the FFN's module.
        hidden: width of the stream.

    Raises:
        ArchError: it is no mixture of the kind that is described here.
    """
    module = model.get_submodule(where)
    experts = getattr(module, EXPERTS, None)
    if experts is None:
        return None
    tensors = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    router = next((name for name in ROUTERS if isinstance(getattr(module, name, None), nn.Module)), None)
    shared = next((name for name in SHARED if hasattr(module, name)), None)
    stack, down = (tensors.get(f"{EXPERTS}.{name}", ()) for name in _STACKS)
    if router is None or not hasattr(getattr(module, router), "top_k") or len(stack) != 3 or len(down) != 3:
        raise ArchError(
            f"{where} is a {type(module).__name__} with a router or experts that nobody described; wanted a router with"
            f" top_k, and experts stacked as {' and '.join(_STACKS)}"
        )
    transposed = bool(getattr(experts, "is_transposed", False))
    n, width = down[0], down[1 if transposed else 2]
    wanted = (n, hidden, 2 * width) if transposed else (n, 2 * width, hidden)
    weight = tensors.get(f"{router}.weight", ())
    if stack != wanted or weight != (n, hidden):
        raise ArchError(f"{where}: experts {list(stack)} and {list(down)} do not fit its router {list(weight)}")
    known = {f"{EXPERTS}.{stacked}{tail}" for stacked in _STACKS for tail in ("", "_bias")}
    known |= {f"{router}.weight", f"{router}.bias", f"{_SHARED_GATE}.weight"}
    known |= {f"{shared}.{linear}.weight" for linear in _LINEARS}
    if odd := sorted(set(tensors) - known):
        raise ArchError(f"parameter '{where}.{odd[0]}' is not part of a mixture of experts as described here")
    routing = routing_of(getattr(module, router))
    if routing.top_k < 1 or width < 1:
        raise ArchError(
            f"{where}: a token takes {routing.top_k} of its {n} experts of {width} channels; wanted at least 1 of each"
        )
    if n % routing.groups or n < routing.fewest:
        raise ArchError(
            f"{where} has {n} experts, and its router wants at least {routing.fewest} in {routing.groups} equal groups"
        )
    return Mixture(where, router, shared, n, width, hidden, transposed, tensors, routing)
