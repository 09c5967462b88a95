"""Offsets of learned gates shifted until a share of the context is live."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.edit.context_gates import ContextGates

LANDINGS, SPARE = 6, 0.002
"""Passes after which offsets stay, and how much above a target is near enough."""
USUAL_LANDINGS = 3
"""Passes that it takes mostly."""


@torch.no_grad()
def land_(
    model: PreTrainedModel, gates: ContextGates, batches: Sequence[Mapping[str, Tensor]], target: float
) -> tuple[float, list[float]]:
    """Shift all offsets of step gates, which are held on the model, until just over `target` of the context of batches
    is live.

    A key is live while its least score is above 0, so that the shift is a quantile of least scores. What is dropped
    changes what later layers read, which a few passes settle.

    Returns:
        The shift, and what is live in each layer.
    """
    starts = [gate.offset.clone() for gate in gates.gates]
    found: list[tuple[float, float, list[float]]] = []
    shift, step, least = 0.0, 0.01, list[Tensor]()
    while len(found) < LANDINGS or not any(share >= target for share, _, _ in found):
        for gate, start in zip(gates.gates, starts, strict=True):
            gate.offset.copy_(start + shift)
        least.clear()
        live = live_by_layer(model, gates, batches, least)
        share = sum(live) / len(live)
        found.append((share, shift, live))
        if 0 <= share - target <= 2 * SPARE:
            break
        if len(found) < LANDINGS:
            known = torch.cat(least)
            place = min(len(known), max(1, int((1 - min(1.0, target + SPARE)) * len(known))))
            shift -= float(known.kthvalue(place).values)
        else:
            shift, step = max(one for _, one, _ in found) + step, 2 * step
    _, shift, live = min(one for one in found if one[0] >= target)
    for gate, start in zip(gates.gates, starts, strict=True):
        gate.offset.copy_(start + shift)
    return shift, live


def live_by_layer(
    model: PreTrainedModel,
    gates: ContextGates,
    batches: Sequence[Mapping[str, Tensor]],
    least: list[Tensor] | None = None,
) -> list[float]:
    """The share of real entries that each layer keeps on batches, the gates being held on the model.

    least: takes the least score so far of each of those entries, if given.
    """
    left, pairs = [0.0] * len(gates.gates), [0.0] * len(gates.gates)
    for one in gates.gates:
        one.noting = least is not None
    with torch.no_grad():
        for batch in batches:
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model.base_model(**given, use_cache=False)
            for i, one in enumerate(gates.gates):
                assert one.tally is not None
                left[i] += float(one.tally.left)
                pairs[i] += float(one.tally.pairs)
                if least is not None and one.tally.least is not None:
                    least.append(one.tally.least.float())
                    one.tally.least = None
    for one in gates.gates:
        one.noting = False
    return [kept / max(of, 1) for kept, of in zip(left, pairs, strict=True)]
