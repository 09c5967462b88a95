"""Distillation from what was kept of a teacher's distributions: the student alone is in memory.

The divergence is that of `core.buckets`: of the k most probable outcomes and the rest as one. Logits of the student
exist for a piece of the tokens at a time, as in `DistillObjective`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresso.core.buckets import bucket_divergences
from compresso.core.distillation import Divergence, chunked
from compresso.core.losses import IGNORED
from compresso.training.halves import Compare, Halves, Tokens, next_tokens
from compresso.training.order import Micro, ShuffledBatches
from compresso.training.teacher_store import TeacherStore

OUTCOMES, LOG_PROBS = "taught_outcomes", "taught_log_probs"
"""What a batch holds beside what the model reads; their first dimension are the places that count, not examples."""


class TaughtBatches:
    """Batches with what the teacher says of their examples."""

    def __init__(self, batches: ShuffledBatches, store: TeacherStore) -> None:
        self._batches, self._store = batches, store

    @property
    def global_batch(self) -> int:
        """Examples that one update sees."""
        return self._batches.global_batch

    def at(self, update: int, rows: range) -> dict[str, Tensor]:
        """The given rows of the global batch of an update, on the CPU."""
        taught = self._store.read(self._batches.indices(update, rows))
        return {**self._batches.at(update, rows), OUTCOMES: taught.outcomes, LOG_PROBS: taught.log_probs}


class CachedObjective(nn.Module):
    """The divergence from what was kept of a teacher, averaged over tokens, plus a weighted label loss.

    Args:
        model: the smaller model, with adapters or with trainable weights.
        student: it in halves.
        compare: where it is compared on a batch; as when the teacher was asked.
        divergence, temperature, beta: as in `core.distillation.divergences`.
        hard_weight: of the cross-entropy of labels.
        tokens: as in `DistillObjective`, and as when the teacher was asked.
        chunk: tokens whose logits exist at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Halves,
        *,
        compare: Compare = next_tokens,
        divergence: Divergence = "forward",
        temperature: float = 1.0,
        beta: float = 0.5,
        hard_weight: float = 0.0,
        tokens: Tokens = "labelled",
        chunk: int = 512,
    ) -> None:
        """Check that the student can be cut. Raises ArchError if not."""
        super().__init__()
        student.check()
        self.model = model
        self._student, self._compare = student, compare
        self._divergence: Divergence = divergence
        self._temperature, self._beta, self._hard_weight = temperature, beta, hard_weight
        self._tokens: Tokens = tokens
        self._chunk = chunk

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, labels, and what `TaughtBatches` adds.

        Returns:
            "loss" [] to differentiate, and to log "divergence", and "hard" where it has a weight.

        Raises:
            ValueError: no position of the batch counts, or others than those that the teacher was asked for.
        """
        at = self._compare(batch, self._tokens)
        outcomes, taught = batch[OUTCOMES], batch[LOG_PROBS]
        targets = at.targets[at.places]
        if len(targets) != len(outcomes):
            raise ValueError(
                f"the teacher was asked for {len(outcomes)} places of a batch of which {len(targets)} count"
            )
        last, _ = self._student.read(batch)
        n_labels = int((targets != IGNORED).sum())
        if self._hard_weight and not n_labels:
            raise ValueError(
                f"none of a batch's {len(targets)} tokens is labelled, so hard_weight has nothing to weigh"
            )

        def loss(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._student.logits(part)
            given = outcomes[rows].to(logits.device, torch.int64), taught[rows].to(logits.device)
            each = bucket_divergences(logits, *given, self._divergence, self._temperature, self._beta)
            divergence = each.sum() / len(targets)
            if not self._hard_weight:
                return divergence, divergence.reshape(1)
            sums = functional.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORED, reduction="sum")
            hard = sums / n_labels
            return divergence + self._hard_weight * hard, torch.stack([divergence, hard])

        total, facts = chunked(loss, last[at.places], self._student.parameters(), self._chunk)
        return {"loss": total, **dict(zip(("divergence", "hard"), facts, strict=False))}
