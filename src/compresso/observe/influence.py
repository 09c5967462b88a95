"""Scores of layers and sub-layers that need a pass over data: the cosine distance between the residual
stream before and after each.

The stream is read where blocks begin and end, so before the final norm (the last of transformers' `hidden_states` lies
behind it), and only at real tokens: padding counts nowhere. States are folded as they appear; no pass keeps more than
one of them, but for the last token's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.core.influence import angle, cosine_distance
from compresso.errors import ArchError, NumericError
from compresso.observe.folds import across, known_sums
from compresso.observe.observe import Batch, Pass, observe
from compresso.observe.residual import Block, last_tokens, residual, tokens
from compresso.observe.sites import See
from compresso.solve.depth import parts_of

_SUB_LAYERS = (Kind.ATTENTION, Kind.MLP)


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
    batches: Iterable[Batch],
    how: Pass | None = None,
) -> Influence:
    """1 - cos between the residual stream before and after each part, averaged over all real tokens (arXiv 2403.03853,
    eq. 1).

    Args:
        model: run in eval mode without gradients, head left out.
        blocks: its layers.
        axes: `Arch.axes(model)`.
        kinds: which parts to score: LAYER, ATTENTION, MLP. Around a sub-layer the stream is what enters the block plus
            what it and the sub-layers before it wrote.
        batches: {"input_ids", "attention_mask", ...}, each int64 [batch, seq].
        how: display and journal of the pass.

    Raises:
        NumericError: a state is not finite, or no token has a direction.
        ArchError: sub-layers are asked for, and what they write does not add up to what leaves the block; or layers lie
            in several lists, those of stages.
    """
    if twice := [kind for kind in kinds if sum(axis.kind == kind for axis in axes) > 1]:
        raise ArchError(
            f"block influence follows one list of layers, and this model has a list of {twice[0]} units in each of its"
            " stages; score them by the loss without each, such as by depth_order: loss"
        )
    parts = {axis.kind: axis for axis in axes if axis.kind in kinds}

    def ran(layer: int, block: Block, see: See) -> None:
        """Show how far each part of a block turned each token [tokens, 1]."""
        if Kind.LAYER in parts:
            see(f"{Kind.LAYER} {layer}", cosine_distance(block.entered, block.left).unsqueeze(-1))
        stream = block.entered.to(torch.promote_types(block.entered.dtype, torch.float32))
        for kind in _SUB_LAYERS:
            if kind in block.written:
                before, stream = stream, stream + block.written[kind]
                if kind in parts:
                    see(f"{kind} {layer}", cosine_distance(before, stream).unsqueeze(-1))
        if block.written:
            _check_sum(layer, stream, block.left)

    sub_layers = [axis for axis in axes if axis.kind in _SUB_LAYERS and any(kind in parts for kind in _SUB_LAYERS)]
    stats = observe(model, [residual(model, blocks, sub_layers, tokens, ran)], known_sums, batches, how=how)
    present = set(parts_of(list(parts.values())))
    scores: dict[str, Tensor] = {}
    for kind, axis in parts.items():
        score = torch.zeros(axis.size, dtype=torch.float64)
        for i in range(axis.size):
            if (axis.name, i) in present:
                total, n_known, _ = stats[f"{kind} {i}"].total if f"{kind} {i}" in stats else torch.zeros(3, 1)
                if not n_known:
                    raise NumericError(
                        f"{kind} {i}: no token of the calibration data has a direction there, its states are all zero;"
                        " check the weights"
                    )
                score[i] = total / n_known
        scores[axis.name] = score
    n_tokens = max((found.n for found in stats.values()), default=0)
    return Influence(scores, n_tokens, sum(int(found.total[2]) for found in stats.values()))


def angular_distances(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Iterable[Batch], how: Pass | None = None
) -> Tensor:
    """Angle / pi between the streams before any two layers [layers + 1, layers + 1], float64 on the CPU (arXiv
    2403.17887, eq. 7).

    Only the last real token of each example counts, as in the paper. Entry [i, j], i <= j, is the mean over examples;
    the last row and column stand for the stream behind the last layer, before the final norm. The rest is 0.

    Args:
        model: run in eval mode without gradients, head left out.
        blocks: its layers.
        batches: {"input_ids", "attention_mask", ...}, each int64 [batch, seq].
        how: display and journal of the pass.

    Raises NumericError if a state is not finite, or one is zero and has no direction.
    """
    states: list[Tensor] = []

    def ran(layer: int, block: Block, see: See) -> None:
        """Keep the last token's states, of which there are few, and show all layers' [batch, layers + 1, hidden]."""
        if layer == 0:
            states[:] = [block.entered.cpu()]
        states.append(block.left.cpu())
        if layer == len(blocks) - 1:
            see("angles", torch.stack(states, dim=1).double())

    stats = observe(model, [residual(model, blocks, (), last_tokens, ran)], _angles, batches, how=how)
    size = len(blocks) + 1
    found = stats.get("angles")
    total = torch.zeros(size, size, dtype=torch.float64) if found is None else found.total
    if not bool(total.isfinite().all()):
        raise NumericError(
            "the last token of an example has a zero state, which has no direction; check the weights and the data"
        )
    return total / max(found.n if found else 0, 1)


@across("sum")
def _angles(total: Tensor | None, states: Tensor) -> Tensor:
    """Fold: sum of the angles between the states of any two depths, of states [n, depths, hidden]."""
    stacked = states.transpose(0, 1).contiguous()
    if total is None:
        total = states.new_zeros(len(stacked), len(stacked))
    for i in range(len(stacked)):
        total[i, i:] += angle(stacked[i], stacked[i:]).sum(dim=1)
    return total


def _check_sum(layer: int, summed: Tensor, left: Tensor) -> None:
    """Raise ArchError unless a block's input plus what its sub-layers wrote is its output, up to rounding."""
    allowed = 8 * torch.finfo(left.dtype).eps * float(summed.abs().max().clamp(min=1e-6))
    apart = float((summed - left).abs().max())
    if not apart <= allowed:
        raise ArchError(
            f"layer {layer}: input and sub-layers' outputs differ by {apart:.3g} from its output, so a norm or a scale"
            " follows them; score whole layers (kinds: [layer]) instead"
        )
