"""The loss of many masked sub-models, which is what every search asks for.

Nothing here needs a gradient and none is allocated. The mask is the outer loop, so that a loss is final as soon as it
is known and can be written down; each mask costs one forward pass over all batches, and masks are not packed into one
forward. A mask of 0/1 computes exactly what shrinking would leave (`compresso.edit.gate`).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis
from compresso.core.loss import NEXT_TOKEN, Loss, logits_of
from compresso.core.row import tokens_in
from compresso.edit.gate import gated
from compresso.errors import NumericError, ResumeError
from compresso.solve.depth import Part
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE
from compresso.training.rounds import RoundJournal
from compresso.training.signals import noted_signals


def losses_under(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    masks: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: Loss = NEXT_TOKEN,
    mean_over: Literal["tokens", "batches"] = "tokens",
    journal: RoundJournal | None = None,
    progress: Progress | None = None,
    name: str = "losses",
    most: int | None = None,
) -> Tensor:
    """Mean loss under each of many masks [n_masks], float64, nats a label.

    A token that only padding predicts counts nowhere. A loss that is not finite is returned as it is: whether it means
    a useless candidate or a broken model is the caller's to say.

    Args:
        model: run in evaluation mode; its weights are not touched.
        axes: those that masks may name.
        masks: one mapping a sub-model, axis name -> [size], any floating dtype; axes that it does not name are whole.
        batches: what the model reads, of texts an attention mask [batch, seq] among it, and labels; all of them are
            moved to the model's device, once.
        loss: of a batch.
        mean_over: "tokens" weighs every labelled token alike, "batches" every batch.
        journal: of the losses; those it holds are read instead of taken again, bit for bit. None keeps none.
        progress, name: display.
        most: only so many masks, the first, for shortened runs; the result is as much shorter.

    Raises:
        ValueError: a mask names an unknown axis or has a wrong shape, or a batch has no labelled token.
        ResumeError: the journal holds losses of other masks or other batches.
        Interrupted: SIGINT or SIGTERM came; the journal has the losses that are final.

    Example:
        losses = losses_under(model, axes, [plan.masks(axes) for plan in plans], batches)
        best = plans[int(losses.argmin())]
    """
    masks = masks[:most]
    given = [_Batch.of(batch, model.device, loss) for batch in batches]
    losses, digests = list[float](), list[str]()
    ranks = ALONE if journal is None else journal.ranks
    if journal is not None:
        data = _digest(value for batch in batches for _, value in sorted(batch.items()))
        digests = [_digest((mask[axis] for axis in sorted(mask)), *sorted(mask), data, mean_over) for mask in masks]
        losses = _known(journal, digests)
    tokens = sum(tokens_in(batch.given) for batch in given)
    shown = progress or Progress("silent")
    model.eval()
    with (
        torch.inference_mode(),
        noted_signals() as requests,
        shown.running(len(masks), len(losses), name),
        gated(model, axes, {}) as sites,
    ):
        for i, mask in enumerate(masks[len(losses) :], start=len(losses)):
            sites.set({axis: values.to(model.device) for axis, values in mask.items()})
            losses.append(ranks.agreed(_loss(model, given, loss, mean_over)))
            if journal is not None:
                journal.append({"of": digests[i], "loss": _written(losses[i])})
            shown.step(i + 1, name, {"loss": losses[i]}, tokens)
            ranks.obey(requests, None if journal is None else str(journal.folder))
    return torch.tensor(losses, dtype=torch.float64)


def losses_without(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    candidates: Sequence[Part],
    batches: Sequence[Mapping[str, Tensor]],
    gone: Sequence[Part] = (),
    *,
    loss: Loss = NEXT_TOKEN,
    journal: RoundJournal | None = None,
    progress: Progress | None = None,
    name: str = "losses",
) -> Tensor:
    """Mean loss with each candidate in turn switched off [candidates], float64, nats a label.

    The perplexity criterion of depth pruning (arXiv 2407.14679, section 2.2, "PPL") without the exponential, which
    ranks the same.

    Args:
        model, axes, batches, loss, journal, progress, name: as in `losses_under`.
        candidates: switched off one at a time.
        gone: switched off throughout.

    Raises NumericError if a loss is not finite, else as `losses_under`.
    """
    masks = [_masks(axes, [*gone, candidate]) for candidate in candidates]
    losses = losses_under(model, axes, masks, batches, loss=loss, journal=journal, progress=progress, name=name)
    for (axis, unit), value in zip(candidates, losses.tolist(), strict=True):
        if not math.isfinite(value):
            raise NumericError(f"the loss without unit {unit} of {axis} is not finite; use float32 or bfloat16")
    return losses


@dataclass(frozen=True)
class _Batch:
    """A batch on the device: labels only where something real predicts them, and how many these are."""

    given: Mapping[str, Tensor]
    labels: Tensor
    n_labelled: int

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], device: torch.device, loss: Loss) -> "_Batch":
        given = {name: value.to(device) for name, value in batch.items()}
        mask = given.get("attention_mask")  # pictures have none
        labels = given["labels"] if mask is None else loss.predicted(given["labels"], mask)
        return cls(given, labels, loss.terms(labels))


def _loss(
    model: PreTrainedModel, batches: Sequence[_Batch], loss: Loss, mean_over: Literal["tokens", "batches"]
) -> float:
    """The mean loss over the batches under the masks that are set."""
    total = 0.0
    for batch in batches:
        mean = float(loss.mean(logits_of(model, batch.given), batch.labels))
        total += mean * batch.n_labelled if mean_over == "tokens" else mean
    return total / (sum(batch.n_labelled for batch in batches) if mean_over == "tokens" else len(batches))


def _known(journal: RoundJournal, digests: Sequence[str]) -> list[float]:
    """A journal's losses of the first masks. Raises ResumeError if one is of another mask or other data."""
    losses: list[float] = []
    for i, entry in enumerate(journal.entries()[: len(digests)]):
        if not isinstance(entry, Mapping) or entry["of"] != digests[i]:
            raise ResumeError(
                f"{journal.folder}: loss {i} is of another mask or of other batches; restore these, or start afresh in"
                " another output folder"
            )
        losses.append(float(str(entry["loss"])))
    return losses


def _written(loss: float) -> float | str:
    """A loss as JSON can hold it; floats come back bit for bit."""
    return loss if math.isfinite(loss) else str(loss)


def _digest(tensors: Iterable[Tensor], *words: str) -> str:
    """sha256 of tensors' shapes and values, and of some words."""
    found = hashlib.sha256("\0".join(words).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _masks(axes: Sequence[Axis], gone: Iterable[Part]) -> dict[str, Tensor]:
    """0/1 masks [size] of the axes that have lost units."""
    masks: dict[str, Tensor] = {}
    sizes = {axis.name: axis.size for axis in axes}
    for name, unit in gone:
        masks.setdefault(name, torch.ones(sizes[name]))[unit] = 0
    return masks
