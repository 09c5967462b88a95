"""First guesses of what units are worth, from one forward pass or none; searches among units start from them.

wanda       mean of |W_ij| rms(x_j) over the entries that a unit has in the linear that reads it: Wanda's score of
            weights (arXiv 2306.11695, section 3) as Bonsai takes it for units (arXiv 2402.05406)
magnitude   mean absolute activation of a unit, of a head the norm of its entries' means
random      none
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis
from compresso.errors import ArchError
from compresso.observe.activations import activation_scores, mean_squares, reader, reads
from compresso.observe.observe import Batch, Pass

Prior = Literal["wanda", "magnitude", "random"]


def priors(
    prior: Prior,
    model: PreTrainedModel,
    axes: Sequence[Axis],
    batches: Iterable[Batch],
    seed: int,
    how: Pass | None = None,
) -> dict[str, Tensor]:
    """Axis name -> [size], float64, on the CPU; higher matters more. They compare within an axis only.

    Args:
        prior: which; see this file's header.
        model: read in evaluation mode.
        axes: of heads, query heads or channels.
        batches: input_ids and attention_mask, each int64 [batch, seq]; "random" reads none.
        seed: of "random".
        how: display and journal of the pass.

    Raises ArchError for an axis that no one linear reads, NumericError if an activation is not finite.
    """
    if prior == "random":
        generator = torch.Generator().manual_seed(seed)
        return {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}
    if prior == "magnitude":
        return activation_scores(model, axes, (), batches, "mean", "mean", how)
    found = mean_squares(model, axes, batches, how)
    return {axis.name: _wanda(model, axis, found[axis.name].cpu().sqrt()) for axis in axes}


def _wanda(model: PreTrainedModel, axis: Axis, rms: Tensor) -> Tensor:
    """[size], float64, of the root mean square of each input [in]."""
    weight = reader(model, axis).weight
    for piece in axis.slices:
        if piece.unit is None and (held := model.get_parameter(piece.param)) is weight:
            size = piece.entries(held.detach(), axis.size).abs().cpu().double()  # [size, inputs of one x outputs]
            inputs = reads(axis, rms)
            return (size.reshape(*inputs.shape, -1).mean(dim=2) * inputs).mean(dim=1)
    raise ArchError(f"{axis.name} has no entries in the linear that reads it")
