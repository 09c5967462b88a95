"""Gradients of a frozen model's weights on a few examples, for scores that are read off them (LLM-Pruner, arXiv
2305.11627).

Each gradient is added to its total and freed as soon as the backward pass has made it, so that the gradients of all
weights never lie in memory beside their totals. Totals are float32. Weights stored in float16 are widened meanwhile,
exactly: squares of small gradients would underflow, as they do in the authors' code on a GPU.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.core.loss import NEXT_TOKEN, Loss
from compresso.errors import NumericError
from compresso.observe.observe import Batch, Run, observe
from compresso.observe.sites import Positions, See, Site


def weight_gradients(
    model: PreTrainedModel, names: Collection[str], batch: Batch, micro_batch: int, loss: Loss = NEXT_TOKEN
) -> dict[str, Tensor]:
    """The gradient of a batch's mean loss over labels: name -> tensor in the weight's shape, float32.

    The batch goes through in parts of `micro_batch` examples; the result does not depend on it. Raises NumericError if
    it is not finite.
    """
    labelled = loss.terms(batch["labels"])

    def backward(model: PreTrainedModel, part: Batch, see: See) -> None:
        share = loss.terms(part["labels"]) / labelled
        with torch.enable_grad():
            (loss(model, part) * share).backward()  # pyright: ignore[reportUnknownMemberType]

    return _totals(model, names, _parts(batch, micro_batch), backward, lambda gradient: gradient)


def weight_fisher(
    model: PreTrainedModel, names: Collection[str], batch: Batch, loss: Loss = NEXT_TOKEN
) -> dict[str, Tensor]:
    """Squared gradients of single examples' mean losses, averaged over the examples: name -> tensor in the weight's
    shape, float32.

    The diagonal Fisher information as the paper approximates it (section 3.2). One backward pass an example: the square
    of a batch's gradient is something else. Raises NumericError if it is not finite.
    """
    examples = len(batch["labels"])

    def backward(model: PreTrainedModel, part: Batch, see: See) -> None:
        with torch.enable_grad():
            loss(model, part).backward()  # pyright: ignore[reportUnknownMemberType]

    return _totals(model, names, _parts(batch, 1), backward, lambda gradient: gradient.square() / examples)


def _totals(
    model: PreTrainedModel,
    names: Collection[str],
    parts: Iterable[Batch],
    backward: Run,
    term: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The sum over backward passes of `term` of each named weight's gradient; 0 for a weight that none reached."""

    def added(total: Tensor | None, gradient: Tensor) -> Tensor:
        return (torch.zeros_like(gradient) if total is None else total).add_(term(gradient))

    with _differentiated(model, names) as weights:
        stats = observe(model, [_gradients(weights)], added, parts, run=backward)
        totals = {
            name: stats[name].total if name in stats else torch.zeros_like(weight, dtype=torch.float32)
            for name, weight in weights.items()
        }
    return _finite(totals)


def _gradients(weights: Mapping[str, nn.Parameter]) -> Site:
    """The gradient of each weight as soon as a backward pass has made it, in float32; it is freed."""

    def site(see: See, positions: Positions) -> Sequence[RemovableHandle]:
        def hook(name: str) -> Callable[[Tensor], None]:
            def made(parameter: Tensor) -> None:
                assert parameter.grad is not None
                see(name, parameter.grad.float())
                parameter.grad = None

            return made

        return [weight.register_post_accumulate_grad_hook(hook(name)) for name, weight in weights.items()]

    return site


@contextmanager
def _differentiated(model: PreTrainedModel, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context the named weights, which are yielded, get gradients, and all else is frozen; float16 is
    widened.
    """
    parameters = dict(model.named_parameters())
    stored = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
            parameter.data = parameter.data.float() if parameter.dtype == torch.float16 else parameter.data
        yield {name: parameters[name] for name in sorted(names)}
    finally:
        for name, parameter in parameters.items():
            requires_grad, dtype = stored[name]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


def _parts(batch: Batch, size: int) -> Iterator[dict[str, Tensor]]:
    """A batch a few examples at a time."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def _finite(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals, if all are finite."""
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise NumericError(
                f"the gradient of {name} is not finite: the model's loss overflows on this data; use float32 or"
                " bfloat16"
            )
    return totals
