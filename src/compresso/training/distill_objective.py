"""What distillation minimises: a divergence from a teacher's distributions, and by choice a label loss and one on
hidden states.

Language models are cut where logits are made: hidden states of all tokens are computed at once, logits (which are as
wide as the vocabulary) for a few hundred tokens at a time. Logits of classes and positions are taken whole. The
teacher is no submodule of the objective, so it stays in evaluation mode, frozen, where and in which dtype it is, and
out of every checkpoint.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresso.core.distillation import Comparison, Distance, chunked, compared, dynamic_scale, hidden_distance
from compresso.core.losses import IGNORED
from compresso.training.halves import Compare, Halves, Tokens, next_tokens, refuse_other_outcomes
from compresso.training.order import Micro

LabelLoss = Callable[[Tensor, Tensor], Tensor]


class DistillObjective(nn.Module):
    """The divergence from a teacher, averaged over tokens, plus weighted other losses.

    Args:
        model: the smaller model, with adapters or with trainable weights.
        student, teacher: both models in halves; as many blocks each, in pairs, if hidden states are compared.
        dimensions: which of the teacher's hidden dimensions the student has left [student's hidden], int64; None for
            all.
        divergence, temperature, beta: as in `core.distillation.compared`.
        compare: where both are compared on a batch.
        hard_weight: of the loss of labels: their mean cross-entropy, or what `compare` says in its place.
        intermediate_weight: of the distance between hidden states, scaled to the divergence's size; 0 leaves
            `intermediate` unused.
        intermediate: the distance.
        tokens: where both are compared: "labelled" (positions that predict a label), or "all" but padding.
        chunk: tokens whose logits exist at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Halves,
        teacher: Halves,
        *,
        compare: Compare = next_tokens,
        dimensions: Tensor | None = None,
        divergence: Comparison = "forward",
        temperature: float = 1.0,
        beta: float = 0.5,
        hard_weight: float = 0.0,
        intermediate_weight: float = 0.0,
        intermediate: Distance = "cosine",
        tokens: Tokens = "labelled",
        chunk: int = 512,
    ) -> None:
        """Check that student and teacher fit each other.

        Raises:
            RecipeError: the models decide among different outcomes.
            ArchError: a model that cannot be cut in halves.
        """
        super().__init__()
        refuse_other_outcomes(student.outcomes, teacher)
        for network in (student, teacher):
            network.check()
        self.model = model
        self._student, self._teacher, self._dimensions = student, teacher, dimensions
        self._compare = compare
        self._divergence: Comparison = divergence
        self._intermediate: Distance = intermediate
        self._temperature, self._beta = temperature, beta
        self._hard_weight, self._intermediate_weight = hard_weight, intermediate_weight
        self._tokens: Tokens = tokens
        self._chunk = chunk

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels.

        Returns:
            "loss" [] to differentiate, and to log, where they have a weight: "divergence", "hard", "intermediate"
            (before scaling).

        Raises:
            ValueError: no position of the batch counts.
        """
        at = self._compare(batch, self._tokens)
        with torch.no_grad():
            taught, shown = self._teacher.read(batch)
            taught = taught[at.places.to(taught.device)]
        last, states = self._student.read(batch)
        loss, facts = self._on_logits(last[at.places], taught, at.targets[at.places], at.label_loss)
        if self._intermediate_weight:
            pairs = zip(states, shown, strict=True)
            distances = [self._distance(ours[at.states], theirs[at.states.to(theirs.device)]) for ours, theirs in pairs]
            distance = torch.stack(distances).mean()
            loss = loss + self._intermediate_weight * dynamic_scale(facts["divergence"], distance) * distance
            facts["intermediate"] = distance.detach()
        return {"loss": loss, **facts}

    def _on_logits(
        self, last: Tensor, taught: Tensor, targets: Tensor, label_loss: LabelLoss | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence plus label loss over places: last, taught [n, width] of each model, targets [n]."""
        n_labels = int((targets != IGNORED).sum())
        if self._hard_weight and not n_labels:
            raise ValueError(
                f"none of a batch's {len(targets)} tokens is labelled, so hard_weight has nothing to weigh"
            )

        def loss(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._student.logits(part)
            with torch.no_grad():
                wanted = self._teacher.logits(taught[rows]).to(logits.device)
            divergence = compared(logits, wanted, self._divergence, self._temperature, self._beta).sum() / len(targets)
            if not self._hard_weight:
                return divergence, divergence.reshape(1)
            if label_loss is not None:
                hard = label_loss(logits, targets[rows].to(logits.device))
            else:
                summed = functional.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORED, reduction="sum")
                hard = summed / n_labels
            return divergence + self._hard_weight * hard, torch.stack([divergence, hard])

        chunk = self._chunk if label_loss is None else len(last)  # which of the labels are hard shows in all of them
        total, facts = chunked(loss, last, self._student.parameters(), chunk)
        return total, dict(zip(("divergence", "hard"), facts, strict=False))

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Between hidden states [n, hidden] of one pair of blocks, on the dimensions that both have."""
        if self._dimensions is not None:
            theirs = theirs[:, self._dimensions.to(theirs.device)]
        return hidden_distance(ours, theirs.to(ours.device), self._intermediate)
