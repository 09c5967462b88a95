"""Scores of units that need only forward passes: how large their activations are, or how much a layer rotates the
residual stream.

Minitron, arXiv 2407.14679, section 2.2. Each example's tokens are aggregated first, then the examples; padding is left
out, activations are widened to float32 and sums to float64, so neither the batch nor the order of examples changes a
score.

    channel   the input of the linear that reads it (after activation and gate)
    head      the L2 norm over its entries at the input of the output projection: a key/value head with all its query
              heads
    query     the same of one query head
    hidden    summed over the norms inside the layers: their output (after the norm's weight)
    layer     1 - cosine between the layer's input and its output, mean over all tokens (block influence)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.errors import ArchError, NumericError
from compresso.observe.folds import Fold, Stats, across, moments, squares, sums
from compresso.observe.observe import Batch, Pass, observe
from compresso.observe.sites import Look, Positions, Site, calls, inputs

Aggregate = Literal["mean", "l2", "variance"]
SCORED = (Kind.HEAD, Kind.QUERY, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER)
"""The kinds that have such a score."""


def activation_scores(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    blocks: Sequence[nn.Module],
    batches: Iterable[Batch],
    over_tokens: Aggregate = "mean",
    over_examples: Aggregate = "l2",
    how: Pass | None = None,
) -> dict[str, Tensor]:
    """The scores of this file's header: axis name -> [size], float64, on the CPU; higher matters more.

    Args:
        model: read in evaluation mode.
        axes: of the kinds in SCORED.
        blocks: the model's layers.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        over_tokens: of an example's tokens: the mean of absolute values, their L2 norm, or the variance of the values.
        over_examples: of what the examples have given: mean, L2 norm or variance.
        how: display and journal of the pass.

    Raises ArchError for an axis that has no such score, NumericError if an activation is not finite.
    """
    sites: list[Site] = []
    folds: dict[str, Fold] = {}
    names: dict[str, list[str]] = {}
    for axis in axes:
        modules = list(blocks) if axis.kind == Kind.LAYER else _modules(model, axis, blocks)
        named = {f"{axis.name}/{i}": module for i, module in enumerate(modules)}
        sites.append(calls(named, _look(axis, over_tokens)))
        folds |= dict.fromkeys(named, sums if axis.kind == Kind.LAYER else moments)
        names[axis.name] = list(named)
    stats = observe(model, sites, folds, batches, how=how)
    return {axis.name: _score(axis, [stats[name] for name in names[axis.name]], over_examples) for axis in axes}


def reader(model: nn.Module, axis: Axis) -> nn.Module:
    """The linear that reads the units of an axis of heads, query heads or channels.

    Raises:
        ArchError: there is not exactly one.
    """
    return _modules(model, axis, ())[0]


def mean_inputs(
    model: PreTrainedModel,
    readers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    how: Pass | None = None,
) -> dict[str, Tensor]:
    """Mean input of linears over all tokens but padding: name -> [in], float64.

    Args:
        model: read in evaluation mode.
        readers: linears inside it, by any name.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        how: display and journal of the pass.
    """
    stats = observe(model, [calls(readers, inputs)], sums, batches, how=how)
    return {name: found.total / max(found.n, 1) for name, found in stats.items()}


def mean_squares(
    model: PreTrainedModel, axes: Sequence[Axis], batches: Iterable[Batch], how: Pass | None = None
) -> dict[str, Tensor]:
    """Mean square, over all tokens but padding, of each input of the linear that reads an axis: axis name -> [in],
    float64; its root is the scale that Wanda weighs a column with (arXiv 2306.11695, section 3).

    Which of them a unit owns says `reads`. Raises ArchError for an axis that no one linear reads, NumericError if an
    input is not finite.

    Args:
        model: read in evaluation mode.
        axes: of heads, query heads or channels.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        how: display and journal of the pass.
    """

    @across("sum")
    def wide_squares(total: Tensor | None, rows: Tensor) -> Tensor:
        return squares(total, rows.double())

    readers = {axis.name: reader(model, axis) for axis in axes}
    first = {id(module): name for name, module in reversed(readers.items())}  # axes of one reader have one statistic
    once = {name: module for name, module in readers.items() if first[id(module)] == name}
    stats = observe(model, [calls(once, inputs)], wide_squares, batches, how=how)
    for name, found in stats.items():
        _check_finite(name, found.total)
    means = {name: found.total / max(found.n, 1) for name, found in stats.items()}
    return {name: means[first[id(module)]] for name, module in readers.items()}


def reads(axis: Axis, values: Tensor) -> Tensor:
    """The values of each unit [size, width], from those of the inputs [in] of the linear that reads an axis."""
    gate = next((gate for gate in axis.gates if gate.side == "input"), None)
    return values.reshape(axis.size, -1) if gate is None else gate.entries(values, axis.size)


def _look(axis: Axis, over_tokens: Aggregate) -> Look:
    """What a call of one of an axis' modules shows: of layers, how far each token is turned [tokens, 1]; of all other
    axes, what each example gives [batch, width], float64.
    """
    if axis.kind == Kind.LAYER:
        return _turned

    def look(given: Tensor, output: Tensor, positions: Positions) -> Tensor:
        values = output if axis.kind == Kind.HIDDEN else given
        return _of_examples(positions.rows(values).float(), positions.mask(values), over_tokens)

    return look


def _turned(given: Tensor, output: Tensor, positions: Positions) -> Tensor:
    """1 - cos between what enters and what leaves a layer, of each token [tokens, 1]."""
    return positions.tokens((1 - functional.cosine_similarity(given.float(), output.float(), dim=-1)).unsqueeze(-1))


def _of_examples(values: Tensor, real: Tensor, over_tokens: Aggregate) -> Tensor:
    """What each example gives [batch, width], float64, of values [batch, seq, width] at the positions that are real
    [batch, seq], bool.
    """
    wide = values * real.unsqueeze(-1)
    counts = real.sum(dim=1, keepdim=True).clamp(min=1)
    if over_tokens == "mean":
        return wide.abs().sum(dim=1).double() / counts
    if over_tokens == "l2":
        return wide.square().sum(dim=1).double().sqrt()
    mean = wide.sum(dim=1, keepdim=True) / counts.unsqueeze(-1)
    return ((wide - mean) * real.unsqueeze(-1)).square().sum(dim=1).double() / counts


def _score(axis: Axis, stats: Sequence[Stats], over_examples: Aggregate) -> Tensor:
    """[size], float64. Raises NumericError if it is not finite."""
    if axis.kind == Kind.LAYER:
        score = torch.cat([found.total.cpu() / max(found.n, 1) for found in stats])
    else:
        entries = torch.stack([_over_examples(found, over_examples) for found in stats]).sum(dim=0)
        score = reads(axis, entries).square().sum(dim=1).sqrt()
    _check_finite(axis.name, score)
    return score


def _over_examples(found: Stats, how: Aggregate) -> Tensor:
    """The aggregate over all examples [width], float64, on the CPU."""
    first, second = found.total.cpu()
    if how == "mean":
        return first / max(found.n, 1)
    if how == "l2":
        return second.sqrt()
    return (second / max(found.n, 1) - (first / max(found.n, 1)).square()).clamp(min=0)


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NumericError(f"activations at {name} are not finite on this data; use float32 or bfloat16")


def _modules(model: nn.Module, axis: Axis, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules at which an axis' units show; none for layers, which are looked at whole."""
    if axis.kind not in SCORED:
        raise ArchError(f"units of kind '{axis.kind}' have no activation score; wanted one of {', '.join(SCORED)}")
    if axis.kind == Kind.LAYER:
        return []
    if axis.kind == Kind.HIDDEN:
        inside = {id(module) for block in blocks for module in block.modules()}
        return [norm for norm in map(model.get_submodule, (*axis.norms, *axis.layer_norms)) if id(norm) in inside]
    read = {gate.module for gate in axis.gates if gate.side == "input"}
    written = {gate.module for gate in axis.gates if gate.side == "output"}
    readers = read or {piece.param.rpartition(".")[0] for piece in axis.slices} - written
    if len(readers) != 1:
        raise ArchError(
            f"{axis.name} is read by {sorted(readers) or 'no linear'}; an activation score needs one linear that"
            " reads it"
        )
    return [model.get_submodule(readers.pop())]
