"""Wanda's score of weights as one of whole units: absolute value times the root mean square of the input.

From arXiv 2306.11695, section 3.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis
from compresso.errors import ArchError
from compresso.observe.activations import mean_squares, reader
from compresso.observe.observe import Batch, Pass


def wanda_of_units(
    model: PreTrainedModel, axes: Sequence[Axis], batches: Iterable[Batch], how: Pass | None = None
) -> dict[str, Tensor]:
    """Mean of |W_ij| rms(x_j) over the entries that a unit has in the linear that reads it: axis name -> [size],
    float64, on the CPU; higher matters more. As Bonsai's prior takes it (arXiv 2402.05406).

    Args:
        model: read in evaluation mode.
        axes: of heads or channels.
        batches: input_ids and attention_mask, each int64 [batch, seq].
        how: display and journal of the pass.

    Raises ArchError for an axis that no one linear reads, NumericError if an input is not finite.
    """
    found = mean_squares(model, axes, batches, how)
    return {axis.name: _score(model, axis, found[axis.name].cpu().sqrt()) for axis in axes}


def _score(model: PreTrainedModel, axis: Axis, rms: Tensor) -> Tensor:
    """[size], float64, of the root mean square of each input [in]."""
    weight = reader(model, axis).weight
    for piece in axis.slices:
        if piece.unit is None and (held := model.get_parameter(piece.param)) is weight:
            size = piece.entries(held.detach(), axis.size).abs().cpu().double()  # [size, inputs of one x outputs]
            inputs = rms.reshape(axis.size, -1)
            return (size.reshape(*inputs.shape, -1).mean(dim=2) * inputs).mean(dim=1)
    raise ArchError(f"{axis.name} has no entries in the linear that reads it")
