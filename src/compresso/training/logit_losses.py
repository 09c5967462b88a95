"""The losses that a student has on logits: of labels, and the divergence from a teacher's; a part of the tokens at a
time, since logits are as wide as the vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from compresso.core.distillation import chunked, divergences
from compresso.core.losses import IGNORED
from compresso.training.halves import Halves


def logit_losses(
    student: Halves,
    teacher: Halves | None,
    last: Tensor,
    taught: Tensor | None,
    targets: Tensor,
    *,
    hard: float,
    kl: float,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum [] over places, and "hard" and "divergence" where they have a weight.

    Args:
        student, teacher: in halves; no teacher where nothing is taught.
        last, taught: what logits are made of [n, width] of each; `taught` None where no divergence is asked for.
        targets: labels [n], int64, -100 for none.
        hard, kl: weights of the cross-entropy of labels, and of temperature^2 KL(teacher || student).
        temperature: divides both models' logits.
        chunk: tokens whose logits exist at a time.

    Raises:
        ValueError: labels have a weight, and there are none.
    """
    n_labels = int((targets != IGNORED).sum())
    if hard and not n_labels:
        raise ValueError(f"none of a batch's {len(targets)} tokens is labelled, so hard_weight has nothing to weigh")
    if not hard and taught is None:
        return last.new_zeros((), dtype=torch.float32), {}

    def loss(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
        logits, parts = student.logits(part), list[Tensor]()
        if hard:
            sums = functional.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORED, reduction="sum")
            parts.append(sums / n_labels)
        if taught is not None:
            assert teacher is not None
            with torch.no_grad():
                wanted = teacher.logits(taught[rows]).to(logits.device)
            parts.append(divergences(logits, wanted, "forward", temperature).sum() / len(targets))
        each = torch.stack(parts)
        return (each * each.new_tensor(weights)).sum(), each

    weights = [*([hard] if hard else []), *([] if taught is None else [kl])]
    names = [*(["hard"] if hard else []), *([] if taught is None else ["divergence"])]
    total, facts = chunked(loss, last, student.parameters(), chunk)
    return total, dict(zip(names, facts, strict=True))
