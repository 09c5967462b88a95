"""Scores of units that need only forward passes: how large their activations are, or how much a layer turns the
residual stream.

Minitron, arXiv 2407.14679, section 2.2. Each example's tokens are aggregated first, then the examples; padding is left
out, activations are widened to float32 and sums to float64, so neither the batch nor the order of examples changes a
score.

    channel   the input of the linear that reads it (after activation and gate)
    head      the L2 norm over its entries at the input of the output projection: a key/value head with all its query
              heads
    hidden    summed over the norms inside the layers: their output (after the norm's weight)
    layer     1 - cosine between the layer's input and its output, mean over all tokens (block influence)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.errors import ArchError, NumericError

Aggregate = Literal["mean", "l2", "variance"]
SCORED = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER)
"""The kinds that have such a score."""


@torch.no_grad()
def activation_scores(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    blocks: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    over_tokens: Aggregate = "mean",
    over_examples: Aggregate = "l2",
) -> dict[str, Tensor]:
    """The scores of this file's header: axis name -> [size], float64, on the CPU; higher matters more.

    Args:
        model: read in evaluation mode.
        axes: of the kinds in SCORED.
        blocks: the model's layers.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        over_tokens: of an example's tokens: the mean of absolute values, their L2 norm, or the variance of the values.
        over_examples: of what the examples have given: mean, L2 norm or variance.

    Raises ArchError for an axis that has no such score, NumericError if an activation is not finite.
    """
    model.eval()
    places = [_Place(axis, blocks, _sites(model, axis, blocks), over_tokens, over_examples) for axis in axes]
    with _watched(places):
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            for place in places:
                place.real = inputs["attention_mask"].bool()
            model.base_model(**inputs, use_cache=False)
    return {place.axis.name: place.score() for place in places}


def reader(model: nn.Module, axis: Axis) -> nn.Module:
    """The linear that reads the units of a head or channel axis. Raises ArchError if there is not exactly one."""
    return _sites(model, axis, ())[0]


@torch.no_grad()
def mean_inputs(
    model: PreTrainedModel, readers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean input of linears over all tokens but padding: name -> [in], float64.

    Args:
        model: read in evaluation mode.
        readers: linears inside it, by any name.
        batches: input_ids and attention_mask, each int64 [batch, seq].
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    real, n_tokens = torch.zeros(0), 0

    def adder(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].reshape(*real.shape, -1)[real].double().sum(dim=0)
            sums[name] = sums[name] + seen if name in sums else seen

        return add

    handles = [module.register_forward_pre_hook(adder(name)) for name, module in readers.items()]
    try:
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            real = inputs["attention_mask"].bool()
            n_tokens += int(real.sum())
            model.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(n_tokens, 1) for name, total in sums.items()}


class _Sums:
    """What one site has shown so far: the sum of the examples' aggregates and of their squares."""

    def __init__(self, over_tokens: Aggregate, over_examples: Aggregate) -> None:
        self.over_tokens, self.over_examples = over_tokens, over_examples
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.n = 0

    def add(self, values: Tensor, real: Tensor) -> None:
        """values [batch, seq, width] at the positions that are real [batch, seq], bool."""
        wide = values.float() * real.unsqueeze(-1)
        counts = real.sum(dim=1, keepdim=True).clamp(min=1)
        if self.over_tokens == "mean":
            each = wide.abs().sum(dim=1).double() / counts
        elif self.over_tokens == "l2":
            each = wide.square().sum(dim=1).double().sqrt()
        else:
            mean = wide.sum(dim=1, keepdim=True) / counts.unsqueeze(-1)
            each = ((wide - mean) * real.unsqueeze(-1)).square().sum(dim=1).double() / counts
        self.first = self.first + each.sum(dim=0)
        self.second = self.second + each.square().sum(dim=0)
        self.n += len(each)

    def value(self) -> Tensor:
        """The aggregate over all examples [width], float64, on the CPU."""
        first, second = torch.as_tensor(self.first).cpu(), torch.as_tensor(self.second).cpu()
        if self.over_examples == "mean":
            return first / max(self.n, 1)
        if self.over_examples == "l2":
            return second.sqrt()
        return (second / max(self.n, 1) - (first / max(self.n, 1)).square()).clamp(min=0)


class _Place:
    """Where one axis' units show, and what was seen there."""

    def __init__(
        self,
        axis: Axis,
        blocks: Sequence[nn.Module],
        sites: Sequence[nn.Module],
        over_tokens: Aggregate,
        over_examples: Aggregate,
    ) -> None:
        self.axis, self.sites = axis, list(blocks) if axis.kind == Kind.LAYER else sites
        self.real = torch.zeros(0)
        self._sums = [_Sums(over_tokens, over_examples) for _ in sites]
        self._distance, self._n_tokens = torch.zeros(len(blocks), dtype=torch.float64), 0

    def see(self, i: int, given: Tensor, output: Tensor) -> None:
        """A call of the i-th site, with its first input and its output, each [batch, seq, width]."""
        if self.axis.kind == Kind.LAYER:
            distance = 1 - functional.cosine_similarity(given.float(), output.float(), dim=-1)
            self._distance[i] += distance.double()[self.real].sum().cpu()
            self._n_tokens += int(self.real.sum()) if i == 0 else 0
        else:
            self._sums[i].add(output if self.axis.kind == Kind.HIDDEN else given, self.real)

    def score(self) -> Tensor:
        """[size], float64. Raises NumericError if it is not finite."""
        if self.axis.kind == Kind.LAYER:
            score = self._distance / max(self._n_tokens, 1)
        else:
            entries = torch.stack([sums.value() for sums in self._sums]).sum(dim=0)
            score = entries.reshape(self.axis.size, -1).square().sum(dim=1).sqrt()
        if not bool(score.isfinite().all()):
            raise NumericError(f"activations at {self.axis.name} are not finite on this data; use float32 or bfloat16")
        return score


def _sites(model: nn.Module, axis: Axis, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules at which an axis' units show; none for layers, which are looked at whole."""
    if axis.kind not in SCORED:
        raise ArchError(f"units of kind '{axis.kind}' have no activation score; wanted one of {', '.join(SCORED)}")
    if axis.kind == Kind.LAYER:
        return []
    if axis.kind == Kind.HIDDEN:
        inside = {id(module) for block in blocks for module in block.modules()}
        return [norm for norm in map(model.get_submodule, axis.norms) if id(norm) in inside]
    read = {gate.module for gate in axis.gates if gate.side == "input"}
    written = {gate.module for gate in axis.gates if gate.side == "output"}
    readers = read or {piece.param.rpartition(".")[0] for piece in axis.slices} - written
    if len(readers) != 1:
        raise ArchError(
            f"{axis.name} is read by {sorted(readers) or 'no linear'}; an activation score needs one linear that"
            " reads it"
        )
    return [model.get_submodule(readers.pop())]


@contextmanager
def _watched(places: Sequence[_Place]) -> Iterator[None]:
    """Show every call of the places' sites to them."""

    def watcher(place: _Place, i: int) -> Callable[..., None]:
        def shown(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            place.see(
                i, inputs[0] if inputs else named["hidden_states"], output[0] if isinstance(output, tuple) else output
            )

        return shown

    handles = [
        site.register_forward_hook(watcher(place, i), with_kwargs=True)
        for place in places
        for i, site in enumerate(place.sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
