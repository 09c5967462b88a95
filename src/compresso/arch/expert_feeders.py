"""What writes the inputs of a mixture's experts, so that a scale can move into their weights (see `arch/producers.py`).

The norm in front of the mixture, for the first matrix of every expert and a shared expert's gate and up; the router and
a shared expert's own gate read it, too. For an expert's down, the up half of its first matrix, where a gate multiplies
it and nothing else happens: not in gpt-oss, whose up is clamped and shifted.
"""

from torch import nn

from compresso.arch.mixture import EXPERTS, SHARED
from compresso.arch.producers import Feeder
from compresso.arch.routers import ROUTERS

_SHARED_GATE = "shared_expert_gate"


def expert_feeders(mixture: nn.Module, where: str, norm: str) -> dict[tuple[str, ...], Feeder]:
    """By the linears and matrices that read one input; empty where no stacked experts are.

    Args:
        mixture: the module that holds router and experts.
        where: its name, relative to the block, which all names here are.
        norm: name of the norm in front of it.
    """
    experts = getattr(mixture, EXPERTS, None)
    if experts is None or not hasattr(experts, "gate_up_proj"):
        return {}
    matrices = {
        stack: tuple(f"{where}.{EXPERTS}.{stack}.{e}" for e in range(len(experts.get_parameter(stack))))
        for stack in ("gate_up_proj", "down_proj")
    }
    shared = next((name for name in SHARED if hasattr(mixture, name)), None)
    pair = tuple(f"{where}.{shared}.{name}" for name in ("gate_proj", "up_proj")) if shared else ()
    beside = tuple(f"{where}.{n}.weight" for n in (*ROUTERS, _SHARED_GATE) if hasattr(mixture, n))
    in_front = Feeder(norm, readers=(*matrices["gate_up_proj"], *pair), beside=beside)
    found: dict[tuple[str, ...], Feeder] = {(name,): in_front for name in matrices["gate_up_proj"]}
    if pair:
        found[pair] = in_front
    if not getattr(experts, "is_transposed", False):
        found |= {(name,): Feeder(f"{where}.{EXPERTS}", expert=e) for e, name in enumerate(matrices["down_proj"])}
    return found
