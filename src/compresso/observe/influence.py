"""Scores of layers and sub-layers that need a pass over data: how far each turns the residual stream.

The stream is read where blocks begin and end, so before the final norm (the last of transformers' `hidden_states` lies
behind it), and only at real tokens: padding counts nowhere. States are folded as they appear; no pass keeps more than
one of them, but for the last token's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.core.influence import angle, cosine_distance
from compresso.errors import ArchError, NumericError
from compresso.observe.residual import Block, run_body, watched
from compresso.solve.depth import parts_of

_SUB_LAYERS = (Kind.ATTENTION, Kind.MLP)


@dataclass
class _Mean:
    """A running mean over tokens, float64; values of tokens without a direction (NaN) are left out and counted."""

    total: float = 0.0
    count: int = 0
    left_out: int = 0

    def add(self, values: Tensor) -> None:
        """Take in [tokens]."""
        known = values[~values.isnan()].double()
        self.total += float(known.sum())
        self.count += len(known)
        self.left_out += len(values) - len(known)

    def value(self, what: str) -> float:
        """The mean. Raises NumericError if nothing was taken in."""
        if not self.count:
            raise NumericError(
                f"{what}: no token of the calibration data has a direction there, its states are all zero; check the"
                " weights"
            )
        return self.total / self.count


@dataclass
class Influence:
    """Block influence.

    Args:
        scores: axis name -> [size], float64 on the CPU; 0 for a sub-layer that has been removed before.
        tokens: tokens that were looked at.
        left_out: of all states, those that were zero before or after a part and so have no direction.
    """

    scores: dict[str, Tensor]
    tokens: int
    left_out: int


def block_influence(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    axes: Sequence[Axis],
    kinds: Sequence[Kind],
    batches: Iterable[Mapping[str, Tensor]],
) -> Influence:
    """1 - cos between the residual stream before and after each part, averaged over all real tokens (arXiv 2403.03853,
    eq. 1).

    Args:
        model: run in eval mode without gradients, head left out.
        blocks: its layers.
        axes: `Arch.axes(model)`.
        kinds: which parts to score: LAYER, ATTENTION, MLP. Around a sub-layer the stream is what enters the block plus
            what it and the sub-layers before it wrote.
        batches: {"input_ids", "attention_mask", ...}, each [batch, seq].

    Raises:
        NumericError: a state is not finite, or no token has a direction.
        ArchError: sub-layers are asked for, and what they write does not add up to what leaves the block.
    """
    parts = {axis.kind: axis for axis in axes if axis.kind in kinds}
    means = {(axis.name, i): _Mean() for axis in parts.values() for i in range(axis.size)}

    def fold(layer: int, block: Block) -> None:
        """Take in one block of one batch."""
        if Kind.LAYER in parts:
            means[parts[Kind.LAYER].name, layer].add(cosine_distance(block.entered, block.left))
        stream = block.entered.to(torch.promote_types(block.entered.dtype, torch.float32))
        for kind in _SUB_LAYERS:
            if kind in block.written:
                before, stream = stream, stream + block.written[kind]
                if kind in parts:
                    means[parts[kind].name, layer].add(cosine_distance(before, stream))
        if block.written:
            _check_sum(layer, stream, block.left)

    sub_layers = [axis for axis in axes if axis.kind in _SUB_LAYERS and any(kind in parts for kind in _SUB_LAYERS)]
    tokens = 0
    for batch in batches:
        real = batch["attention_mask"].to(model.device).bool()
        with watched(model, blocks, sub_layers, lambda states, real=real: states[real], fold):
            run_body(model, batch)
        tokens += int(real.sum())
    present = set(parts_of(list(parts.values())))
    scores = {
        axis.name: torch.tensor(
            [
                means[axis.name, i].value(f"{axis.kind} {i}") if (axis.name, i) in present else 0.0
                for i in range(axis.size)
            ],
            dtype=torch.float64,
        )
        for axis in parts.values()
    }
    return Influence(scores, tokens, sum(mean.left_out for mean in means.values()))


def angular_distances(model: PreTrainedModel, blocks: nn.ModuleList, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Angle / pi between the streams before any two layers [layers + 1, layers + 1], float64 on the CPU (arXiv
    2403.17887, eq. 7).

    Only the last real token of each example counts, as in the paper. Entry [i, j], i <= j, is the mean over examples;
    the last row and column stand for the stream behind the last layer, before the final norm. The rest is 0.

    Raises NumericError if a state is not finite, or one is zero and has no direction.
    """
    layers, examples = len(blocks), 0
    total = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    for batch in batches:
        mask = batch["attention_mask"].to(model.device)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # of padding on either side
        rows = torch.arange(len(mask), device=mask.device)
        states: list[Tensor] = []

        def keep(layer: int, block: Block, states: list[Tensor] = states) -> None:
            """The last token's states, of which there are few."""
            states.extend([block.entered, block.left] if layer == 0 else [block.left])

        with watched(model, blocks, (), lambda states, rows=rows, last=last: states[rows, last], keep):
            run_body(model, batch)
        stacked = torch.stack([state.cpu() for state in states]).double()  # [layers + 1, batch, hidden]
        for i in range(layers + 1):
            total[i, i:] += angle(stacked[i], stacked[i:]).sum(dim=1)
        examples += len(mask)
    if not bool(total.isfinite().all()):
        raise NumericError(
            "the last token of an example has a zero state, which has no direction; check the weights and the data"
        )
    return total / max(examples, 1)


def _check_sum(layer: int, summed: Tensor, left: Tensor) -> None:
    """Raise ArchError unless a block's input plus what its sub-layers wrote is its output, up to rounding."""
    allowed = 8 * torch.finfo(left.dtype).eps * float(summed.abs().max().clamp(min=1e-6))
    apart = float((summed - left).abs().max())
    if not apart <= allowed:
        raise ArchError(
            f"layer {layer}: input and sub-layers' outputs differ by {apart:.3g} from its output, so a norm or a scale"
            " follows them; score whole layers (kinds: [layer]) instead"
        )
