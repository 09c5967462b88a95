"""What a decoded token reads, the speed-up that this allows, and the words for a speed-up that did not come.

At small batches a decoding step does little but read: every weight once, for all sequences of the batch together, and
each sequence's own key/value cache. So dense bytes over pruned bytes bounds the speed-up where reading sets the pace.
Of a mixture of experts a step reads those that some token of the batch chooses: of E experts, k a token, E (1 - (1 -
k/E)^B) of a batch of B on average, where each is as likely; so k at batch 1, and at most E. Routers that prefer some
experts, and sequences that are alike, choose fewer.

The bound leaves out activations, writing and copying the cache, arithmetic (which takes over at large batches), the
time to launch kernels (which takes over in small models), and processor caches that hold a whole small model. Where one
of these sets the pace, a speed-up lies on either side of the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.mixture import EXPERTS
from compresso.arch.routers import ROUTERS
from compresso.edit.context_cache import ContextCache

MANY_ZEROS = 0.1
"""Share of a model's matrix entries that are exactly zero, above which words about speed mention it."""
LEAST_NOISE = 0.02
"""A speed-up closer to 1 than this is none, however quiet the machine."""
WORTH_KNOWING = 1.1
"""A median above this that lies within noise is called uncertain, not none."""


@dataclass(frozen=True)
class Stored:
    """The experts of one mixture.

    Args:
        bytes: of all of them together.
        experts: how many there are.
        per_token: how many of them a token takes.
    """

    bytes: int
    experts: int
    per_token: int

    def chosen(self, batch: int) -> float:
        """How many different experts the tokens of a step choose on average, if each is as likely; at most all.

        >>> Stored(0, 8, 2).chosen(1), Stored(0, 8, 2).chosen(2), Stored(0, 8, 8).chosen(1)
        (2.0, 3.5, 8.0)
        """
        return self.experts * (1 - (1 - min(self.per_token / self.experts, 1)) ** batch)


@dataclass(frozen=True)
class Weights:
    """What speed may depend on in a model's parameters.

    Args:
        bytes_read: bytes of weights that one step reads, where every expert is chosen.
        zeros: share of exact zeros among the entries of all matrices.
        tensors: shape and dtype of every parameter.
        mixtures: of a mixture of experts, one a layer that has some.
    """

    bytes_read: int
    zeros: float
    tensors: tuple[tuple[tuple[int, ...], str], ...]
    mixtures: tuple[Stored, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Weights":
        """Those of a live model; reads all weights once."""
        matrices = [p for p in model.parameters() if p.dim() > 1]
        zeros = sum(p.numel() - int(p.count_nonzero()) for p in matrices) / max(1, sum(p.numel() for p in matrices))
        tensors = tuple((tuple(p.shape), str(p.dtype)) for p in model.parameters())
        return cls(weight_bytes_read(model), zeros, tensors, stored_experts(model))

    def read(self, batch: int) -> float:
        """Bytes of weights that one step of a batch reads; of experts those expected to be chosen."""
        return self.bytes_read - sum(one.bytes * (1 - one.chosen(batch) / one.experts) for one in self.mixtures)


def weight_bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoding step reads: all parameters, tied ones once, an untied input embedding omitted
    (a row a token). Of a mixture all experts, as a step may choose them all; see `Weights.read`.
    """
    lookup = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is lookup
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not lookup)


def stored_experts(model: nn.Module) -> tuple[Stored, ...]:
    """The mixtures of a model, in order: modules with experts, stacked or apart, beside a router that says how many of
    them a token takes. Experts whose router does not say it count as any other weights.
    """
    found: list[Stored] = []
    for module in model.modules():
        experts = getattr(module, EXPERTS, None)
        router = next((one for name in ROUTERS if isinstance(one := getattr(module, name, None), nn.Module)), None)
        per_token = getattr(router, "top_k", None)
        stored = list(experts.parameters()) if isinstance(experts, nn.Module) else []
        if stored and isinstance(per_token, int):
            count = len(experts) if isinstance(experts, nn.ModuleList) else len(stored[0])
            found.append(Stored(sum(p.numel() * p.element_size() for p in stored), count, per_token))
    return tuple(found)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values in a transformers cache, over all its layers; layers that hold none, or other states,
    count nothing. Of a cache that frees, bytes of all that is allocated.
    """
    if isinstance(cache, ContextCache):
        return cache.allocated_bytes()
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def mean_cache_read(before: int, after: int, steps: int) -> float:
    """Mean bytes of cache that a step reads, when `steps` steps took the cache from `before` to `after` bytes.

    A step appends its token first and then reads, so step t of n reads `before + t (after - before) / n`.
    """
    return before + (after - before) * (steps + 1) / (2 * steps)


def bytes_bound(dense_weights: float, dense_cache: float, weights: float, cache: float) -> float:
    """Speed-up that reading allows: bytes of weights and mean bytes of the batch's cache that a step reads, dense over
    pruned.
    """
    return (dense_weights + dense_cache) / (weights + cache)


def paired(dense_seconds: Sequence[float], seconds: Sequence[float]) -> tuple[list[float], float]:
    """The speed-up of each round against dense in the same round, and how far from 1 their median may lie and still be
    noise.

    That is twice the median distance of the rounds from their median, and at least `LEAST_NOISE`.
    """
    ratios = [dense / own for dense, own in zip(dense_seconds, seconds, strict=True)]
    middle = median(ratios)
    return ratios, max(LEAST_NOISE, 2 * median(abs(ratio - middle) for ratio in ratios))


def verdict(
    ratios: Sequence[float],
    noise: float,
    weights: Weights,
    dense: Weights,
    bound: float | None = None,
    forgets: bool = False,
) -> str | None:
    """The words that belong beside a speed-up: why there is none, or that bytes do not explain it; None if it speaks
    for itself.

    A model is faster if the median of its rounds lies above 1 by more than noise, or every round above 1 by more than
    `LEAST_NOISE`.

    Args:
        ratios, noise: as `paired` returns them; 1 is as fast as dense.
        weights, dense: of the two models.
        bound: what reading bytes allows, where that is known.
        forgets: whether the cache of one of them does not hold everything, so that equal weights do not settle it.
    """
    speedup = median(ratios)
    same = weights.tensors == dense.tensors and not forgets
    zeros = weights.zeros - dense.zeros >= MANY_ZEROS
    if speedup > 1 + noise or min(ratios) > 1 + LEAST_NOISE:
        if same:
            return "not an effect of size: every tensor is as large as the dense model's"
        if bound is not None and speedup > bound * (1 + noise):
            return f"above the bound of {bound:.2f}: reading fewer bytes does not explain all of it"
        return None
    if same:
        return "no speed-up: " + (
            "zeros are stored dense" if zeros else "every tensor is as large as the dense model's"
        )
    words = f"measured {speedup:.2f}, noise {noise:.2f}"
    if bound is not None:
        words += f", against a bound of {bound:.2f}"
    if speedup > WORTH_KNOWING:
        return f"uncertain: {words}; more rounds or a quieter machine would tell"
    if bound is not None and bound > 1 + noise:
        words += ": something other than reading weights sets the pace"
    return f"no speed-up: {words}" + (f"; {weights.zeros:.0%} of its matrices are zeros, stored dense" if zeros else "")
