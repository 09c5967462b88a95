"""Scores of units that need gradients: how much the loss minds when a unit's gate is dimmed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis
from compresso.core.loss import NEXT_TOKEN, Loss, logits_of
from compresso.core.quantities import Cost, CostName
from compresso.core.score import prices
from compresso.edit.gate import gated
from compresso.errors import NumericError
from compresso.observe.folds import squares
from compresso.observe.observe import Batch, Pass, observe
from compresso.observe.sites import See


def gate_taylor(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    batches: Iterable[Batch],
    how: Pass | None = None,
    loss: Loss = NEXT_TOKEN,
) -> dict[str, Tensor]:
    """Squared gradient of each example's loss with respect to each unit's gate at 1, averaged: axis name -> [size],
    float32.

    The diagonal Fisher information of the gates (Michel et al., arXiv 1905.10650, use its absolute first-order form).
    One backward pass a batch: a mask row per example keeps the examples' gradients apart. Weights are never
    differentiated.

    Args:
        model: run in evaluation mode.
        axes: of the units to score.
        batches: what the model reads, and labels.
        how: display and journal of the pass.
        loss: of an example.

    Raises:
        NumericError: if a gradient is not finite.
    """

    def backward(model: PreTrainedModel, batch: Batch, see: See) -> None:
        """Show each axis' gradients, one row an example [batch, size]."""
        labels = batch["labels"]
        rows = labels.shape[0]
        masks = {axis.name: torch.ones(rows, axis.size, device=model.device, requires_grad=True) for axis in axes}
        with torch.enable_grad(), gated(model, axes, masks):
            logits = logits_of(model, batch)
            summed = sum(loss.mean(logits[i : i + 1], labels[i : i + 1]) for i in range(rows))
            gradients = torch.autograd.grad(summed, list(masks.values()))  # type: ignore[arg-type]
        for name, gradient in zip(masks, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise NumericError(
                    f"gate gradient of {name} is not finite: the model's loss overflows on this data; use float32 or"
                    " bfloat16"
                )
            see(name, gradient.float())

    with _frozen(model):
        stats = observe(model, (), squares, batches, run=backward, how=how)
    unseen = {axis.name: torch.zeros(axis.size, device=model.device) for axis in axes if axis.name not in stats}
    return {
        axis.name: unseen[axis.name] if axis.name in unseen else stats[axis.name].total / max(stats[axis.name].n, 1)
        for axis in axes
    }


def sensitivity_per_cost(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    cost: Cost,
    batches: Iterable[Batch],
    of: CostName = "blocks",
    how: Pass | None = None,
    loss: Loss = NEXT_TOKEN,
) -> dict[str, Tensor]:
    """Gate-Taylor scores divided by what each unit takes of a count: axis name -> [size], float32, on the CPU.

    The scores do not depend on how examples are batched, since each example has its own mask row.

    Args:
        model, axes, batches, how, loss: as in `gate_taylor`. Axes whose units take nothing of the count get no scores.
        cost: of the model as it is.
        of: what is counted.

    Raises as `gate_taylor`.
    """
    price = prices(axes, cost, of)
    scores = gate_taylor(model, [axis for axis in axes if axis.name in price], batches, how, loss)
    return {name: score.cpu() / price[name] for name, score in scores.items()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter gets a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
