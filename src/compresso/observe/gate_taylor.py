"""Scores of units that need a pass over data: how much the loss minds when a unit is dimmed."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis
from compresso.core.losses import next_token_loss
from compresso.edit.gate import gated
from compresso.errors import NumericError


def gate_taylor(
    model: PreTrainedModel, axes: Sequence[Axis], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Squared gradient of each example's loss with respect to each unit's gate at 1, averaged: axis name -> [size],
    float32.

    The diagonal Fisher information of the gates (Michel et al., arXiv 1905.10650, use its absolute first-order form).
    One backward pass a batch: a mask row per example keeps the examples' gradients apart. Weights are never
    differentiated.

    Raises:
        NumericError: if a gradient is not finite.
    """
    total = {axis.name: torch.zeros(axis.size, device=model.device) for axis in axes}
    n_examples = 0
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.eval()
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        rows = labels.shape[0]
        masks = {axis.name: torch.ones(rows, axis.size, device=model.device, requires_grad=True) for axis in axes}
        with torch.enable_grad(), gated(model, axes, masks):
            logits = model(**batch, use_cache=False).logits
            loss = sum(next_token_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(rows))
            gradients = torch.autograd.grad(loss, list(masks.values()))  # type: ignore[arg-type]
        for name, gradient in zip(masks, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise NumericError(
                    f"gate gradient of {name} is not finite: the model's loss overflows on this data; use float32 or"
                    " bfloat16"
                )
            total[name] += gradient.float().square().sum(dim=0)
        n_examples += rows
    for parameter in frozen:
        parameter.requires_grad_(True)
    return {name: value / max(n_examples, 1) for name, value in total.items()}
