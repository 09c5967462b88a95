"""Removal that proves itself: the masked model and the smaller one must compute the same on the same input.

If tokens leave, the input is written in those that stay, and the masked model's logits of the others are left out of
the comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.outputs import any_input, outputs
from compresso.core.axis import Axis
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.rounding import ROUNDINGS, full_precision, rounding_of
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError

_IDS = 64
"""Tokens that are compared on where no example is given."""
_EXPECTED = 1e3
"""Roundings of the largest logit that need no further question."""
_OF_SPREAD = 0.5
"""Most of the logits' standard deviation that is excused by roundings."""


@dataclass(frozen=True)
class Removal:
    """What a stage has removed so far, of the model that it was given.

    Args:
        stage: its name.
        parameters: of that model.
        sizes: of its axes.
        plan: what stays of it.
        difference: the largest between outputs of a masked and a smaller model.
    """

    stage: str
    parameters: Mapping[str, int]
    sizes: Mapping[str, int]
    plan: Plan = field(default_factory=Plan)
    difference: float = 0.0

    def facts(self, after: Mapping[str, int]) -> dict[str, Any]:
        """For the records; after: parameters that are left."""
        return {
            "parameters_before": self.parameters,
            "parameters_after": after,
            "kept_share_of_blocks": after["blocks"] / self.parameters["blocks"],
            "units_kept": {name: f"{len(units)}/{self.sizes[name]}" for name, units in self.plan.kept.items()},
            "masked_minus_smaller_max_abs": self.difference,
        }


def remove_(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    masks: Mapping[str, Tensor],
    ids: Sequence[int] = (),
    given: Mapping[str, Tensor] | None = None,
    *,
    by: str = "the plan",
) -> float:
    """Remove the units whose mask is 0 and fold other mask values into the weights; the largest difference of outputs.

    Args:
        model: shrunk in place, left in evaluation mode.
        axes: all of them, of the model as it is.
        masks: axis name -> [size].
        ids: tokens to compare on; the first ones of the vocabulary if none, one image of noise for models that read
            images.
        given: all that the model reads, by name, in the place of tokens alone.
        by: who removes, for the message.

    Raises:
        NumericError: if outputs differ by more than the rounding of this model explains, which is measured where they
            differ by more than is usual: the shape surgery would be wrong.
    """
    plan = Plan.from_masks(axes, masks)
    size = int(getattr(model.config, "vocab_size", 0))
    tokens = plan.kept.get("vocab")
    place = {old: new for new, old in enumerate(range(size) if tokens is None else tokens)}
    ids = [i for i in ids or range(min(_IDS, size)) if i in place] or list(place)[:_IDS]
    model.eval()
    with gated(model, axes, {name: mask.to(model.device) for name, mask in masks.items()}):
        masked = _probed(model, ids, given)
    masked = masked if tokens is None else masked[..., list(tokens)]
    soft = {name: mask for name, mask in masks.items() if bool(((mask != 0) & (mask != 1)).any())}
    shrink_(model, axes, plan, soft)
    ids = [place[i] for i in ids]
    smaller = _probed(model, ids, given)
    if smaller.shape[-1] < masked.shape[-1]:  # hidden states of a model without a head
        masked = masked[..., list(plan.kept["hidden"])]
    difference = float((smaller - masked).abs().max())
    if difference <= _EXPECTED * torch.finfo(model.dtype).eps * float(masked.abs().max().clamp(min=1)):
        return difference
    rounding = rounding_of(model, lambda: _probed(model, ids, given), smaller)
    allowed = min(ROUNDINGS * rounding, _OF_SPREAD * float(masked.std()))
    if not difference <= allowed:
        raise NumericError(
            f"{by}: the smaller model's logits differ from the masked model's by {difference:.3g}, more than"
            f" {allowed:.3g} (roundings move them by {rounding:.3g}); the shape surgery is at fault, please report it"
            " with the model's config"
        )
    return difference


def without_tokens(
    original: Callable[[torch.dtype, torch.device], PreTrainedModel], arch: Arch, kept: Sequence[int]
) -> Callable[[torch.dtype, torch.device], PreTrainedModel]:
    """What opens a model, made to open it with the rows of these tokens alone; kept: ascending."""

    def opened(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model without the other tokens."""
        model = original(dtype, device)
        shrink_(model, arch.axes(model), Plan({"vocab": tuple(kept)}))
        return model

    return opened


def _probed(model: PreTrainedModel, ids: Sequence[int], given: Mapping[str, Tensor] | None) -> Tensor:
    """What the model computes, float32, on what is given, on these tokens, or on one image of noise."""
    with full_precision():
        return _outputs(model, ids, given)


def _outputs(model: PreTrainedModel, ids: Sequence[int], given: Mapping[str, Tensor] | None) -> Tensor:
    if given is not None:
        return outputs(model, {name: value.to(model.device) for name, value in given.items()})
    if model.main_input_name == "pixel_values":
        return outputs(model, any_input(model.config).to(model.device))
    return outputs(model, torch.tensor([list(ids)], device=model.device))
