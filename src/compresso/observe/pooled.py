"""Scores of whole layers, attentions and MLPs in one pool with heads, channels and hidden dimensions.

Gate-Taylor looks at a gate where it stands, at 1, and is blind to depth: a layer's gradient there is that of stretching
what it writes, which the layers behind it hardly mind, whether or not they can do without it. So a part is worth what
it costs to leave it out: the rise of the loss without it, taken on a few examples (the perplexity criterion of depth
pruning; arXiv 2407.14679, section 2.2). Both kinds of score are guesses of the same thing, the loss that a removal
costs, and both are wrong where much leaves together: each by a factor, which is measured. What the budget would take of
the units alone, and what it would take of the parts alone, are left out as a whole; how much the loss rises, over the
sum of their scores, is the factor of their pool.

The loss without one part says little of the loss without several: the parts without which a model does best alone are
not those that can leave together. So the rises may be handed out in another order, such as that of block influence: the
least rise to the part that turns the stream least, and so on.

What training gives back is another matter: more of what parts cost than of what units cost. `weight` is what a part's
loss counts for beside that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.loss import NEXT_TOKEN, Loss
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.core.score import prices_of_units
from compresso.errors import NumericError
from compresso.observe.gate_taylor import sensitivity_per_cost
from compresso.observe.losses import losses_under
from compresso.observe.observe import Batch, Pass
from compresso.solve.allocate import allocate
from compresso.solve.depth import parts_of, without
from compresso.training.progress import Progress
from compresso.training.rounds import RoundJournal

PARTS = (Kind.LAYER, Kind.ATTENTION, Kind.MLP)
"""Kinds whose units own their tensors whole."""
LEAST = 1e-3
"""What a part is worth at least, as a share of the median part's rise: one without which the loss falls goes first."""


@dataclass(frozen=True)
class Looks:
    """How the losses are taken and kept.

    Args:
        batches: to take them on: what the model reads, an attention mask, and labels.
        single, pools: journals of the losses without each part, and without each pool; None keeps none.
        progress: display.
        order: scores of the parts, axis name -> [size], by which the rises are handed out; None leaves each with its
            own.
    """

    batches: Sequence[Batch]
    single: RoundJournal | None = None
    pools: RoundJournal | None = None
    progress: Progress | None = None
    order: Mapping[str, Tensor] | None = None


def n_losses(axes: Sequence[Axis], kinds: Sequence[Kind]) -> int:
    """How many losses are taken over these axes of a model, at most; 0 without a part among the kinds."""
    n_parts = len(parts_of([axis for axis in axes if axis.kind in kinds and axis.kind in PARTS]))
    return n_parts + 3 if n_parts else 0  # each, the dense one, and both pools


def pooled_per_cost(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    cost: Cost,
    budget: Budget,
    batches: Sequence[Batch],
    looks: Looks,
    *,
    weight: float = 1.0,
    how: Pass | None = None,
    loss: Loss = NEXT_TOKEN,
) -> dict[str, Tensor]:
    """What the loss is expected to rise by without a unit or part, per what it takes of the budget's count: axis name
    -> [size], on the CPU.

    Without a part among the axes they are gate-Taylor's scores, bit for bit, which then differ by a factor.

    Args:
        model: run in evaluation mode.
        axes: of the units and parts to score. Those that take nothing of the count get no scores.
        cost: of the model as it is.
        budget: that the scores are meant for.
        batches: behind the scores of units.
        looks: behind those of parts.
        weight: of the loss that parts cost, above 0.
        how: of the pass over `batches`.
        loss: of an example.

    Raises:
        NumericError: a gradient or a loss is not finite.
        InfeasibleBudget: the floors of a pool leave nothing to take.
    """
    parts = [axis for axis in axes if axis.kind in PARTS and axis.size]
    units = [axis for axis in axes if axis.kind not in PARTS]
    scores = sensitivity_per_cost(model, units, cost, batches, budget.of, how, loss) if units else {}
    if not parts:
        return scores
    each = _rises(model, parts, looks, loss)
    price = prices_of_units(axes, cost, budget.of)
    paid = [axis for axis in parts if bool((price[axis.name] > 0).any())]  # an MLP takes nothing of a cache
    # a sub-layer that left before takes nothing, and its gate does nothing
    worth = {axis.name: each[axis.name] / price[axis.name].clamp(min=1e-300) for axis in paid}
    for axis in paid:
        free = price[axis.name] == 0
        worth[axis.name][free] = worth[axis.name][~free].max()
    pools = [(units, scores), (paid, worth)]
    taken = [_taken([axis for axis in pool if axis.name in of], of, cost, budget) for pool, of in pools]
    masks = [plan.masks(axes) for plan in taken]
    measured = losses_under(
        model, axes, [{}, *masks], looks.batches, loss=loss, journal=looks.pools, progress=looks.progress, name="pools"
    )
    _check(measured, "what the budget would take of one pool")
    found: dict[str, Tensor] = {}
    rises = (measured[1:] - measured[0]).tolist()
    for (_, of), mask, rise, counts in zip(pools, masks, rises, (1.0, weight), strict=True):
        gone = {name: of[name].double() * price[name] * (mask[name] == 0) for name in of}
        foreseen = sum(float(value.sum()) for value in gone.values())
        factor = rise / foreseen if rise > 0 and foreseen > 0 else 1.0
        found |= {name: score.double() * factor * counts for name, score in of.items()}
    return {axis.name: found[axis.name] for axis in axes if axis.name in found}


def _rises(model: PreTrainedModel, parts: Sequence[Axis], looks: Looks, loss: Loss) -> dict[str, Tensor]:
    """How much the loss rises without each part: axis name -> [size], float64, above 0; 0 for parts not there."""
    each = parts_of(parts)
    masks = [{}, *(_without(parts, part) for part in each)]
    losses = losses_under(
        model,
        parts,
        masks,
        looks.batches,
        loss=loss,
        journal=looks.single,
        progress=looks.progress,
        name="without each part",
    )
    _check(losses, "one of the layers or sub-layers")
    rises = losses[1:] - losses[0]
    rises = rises.clamp(min=max(LEAST * float(rises.median()), 1e-12))
    if looks.order is not None:
        places = torch.stack([looks.order[name][unit] for name, unit in each]).argsort(stable=True)
        rises = torch.empty_like(rises).index_copy_(0, places, rises.sort().values)
    found = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in parts}
    for (name, unit), rise in zip(each, rises.tolist(), strict=True):
        found[name][unit] = rise
    return found


def _without(parts: Sequence[Axis], part: tuple[str, int]) -> dict[str, Tensor]:
    """The mask [size] of one part that is left out."""
    axis = next(axis for axis in parts if axis.name == part[0])
    return without([axis], [part]).masks([axis])


def _taken(pool: Sequence[Axis], scores: Mapping[str, Tensor], cost: Cost, budget: Budget) -> Plan:
    """What a budget takes of one pool; of one that cannot give as much, half of what it can."""
    if not pool:
        return Plan()
    kinds = tuple({axis.kind for axis in pool})
    plain = Budget(budget.keep, budget.of, kinds, floor={k: v for k, v in budget.floor.items() if k in kinds})
    try:
        return allocate(pool, scores, cost, plain)
    except InfeasibleBudget:
        fewest = {axis.name: torch.arange(axis.size) < plain.fewest(axis) for axis in pool}
        smallest = cost({name: mask.double() for name, mask in fewest.items()}).count(budget.of)
        least = float(smallest) / float(cost().count(budget.of))
        return allocate(pool, scores, cost, replace(plain, keep=(1 + least) / 2))


def _check(losses: Tensor, what: str) -> None:
    """Raise NumericError unless all losses are finite."""
    if not bool(losses.isfinite().all()):
        raise NumericError(f"the loss without {what} is not finite; use float32 or bfloat16")
