"""Gradients of a frozen model's weights on a few examples, for scores that are read off them (LLM-Pruner, arXiv
2305.11627).

Each gradient is added to its total and freed as soon as the backward pass has made it, so that the gradients of all
weights never lie in memory beside their totals. Totals are float32. Weights stored in float16 are widened meanwhile,
exactly: squares of small gradients would underflow, as they do in the authors' code on a GPU.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.losses import IGNORED, next_token_loss
from compresso.errors import NumericError


def weight_gradients(
    model: PreTrainedModel, names: Collection[str], batch: Mapping[str, Tensor], micro_batch: int
) -> dict[str, Tensor]:
    """The gradient of a batch's mean loss over labelled tokens: name -> tensor in the weight's shape, float32.

    The batch goes through in parts of `micro_batch` examples; the result does not depend on it. Raises NumericError if
    it is not finite.
    """
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    with _differentiated(model, names, lambda gradient: gradient) as totals:
        for part in _parts(batch, micro_batch):
            share = int((part["labels"][:, 1:] != IGNORED).sum()) / labelled
            (_loss(model, part) * share).backward()  # pyright: ignore[reportUnknownMemberType]
    return _finite(totals)


def weight_fisher(model: PreTrainedModel, names: Collection[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared gradients of single examples' mean losses, averaged over the examples: name -> tensor in the weight's
    shape, float32.

    The diagonal Fisher information as the paper approximates it (section 3.2). One backward pass an example: the square
    of a batch's gradient is something else. Raises NumericError if it is not finite.
    """
    examples = len(batch["labels"])
    with _differentiated(model, names, lambda gradient: gradient.square() / examples) as totals:
        for part in _parts(batch, 1):
            _loss(model, part).backward()  # pyright: ignore[reportUnknownMemberType]
    return _finite(totals)


@contextmanager
def _differentiated(
    model: PreTrainedModel, names: Collection[str], term: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Within the context each backward pass adds `term` of the named weights' gradients to the totals yielded; all else
    is frozen.
    """
    parameters = dict(model.named_parameters())
    stored = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in parameters.items()}
    totals = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in sorted(names)}

    def add_to(total: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total.add_(term(parameter.grad.float()))
            parameter.grad = None

        return hook

    model.eval()
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in totals)
            parameter.data = parameter.data.float() if parameter.dtype == torch.float16 else parameter.data
        handles = [parameters[name].register_post_accumulate_grad_hook(add_to(total)) for name, total in totals.items()]
        with torch.enable_grad():
            yield totals
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            requires_grad, dtype = stored[name]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


def _parts(batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """A batch a few examples at a time."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean loss over labelled tokens [], float32."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    return next_token_loss(model(**inputs, use_cache=False).logits, labels)


def _finite(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals, if all are finite."""
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise NumericError(
                f"the gradient of {name} is not finite: the model's loss overflows on this data; use float32 or"
                " bfloat16"
            )
    return totals
