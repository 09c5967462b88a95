"""What SquareHead minimises: a label loss, hidden states against a teacher's, and by choice a divergence of logits
(Kurtic et al., arXiv 2310.06927, section 3).

    loss = hard_weight x cross-entropy + kl_weight x temperature^2 KL(teacher || student) + feature_weight x SquareHead

The teacher runs first, and its states wait in a queue; behind each block of the student the block's term is taken and
the teacher's state let go; the term's own difference stays until its gradient is taken. What weighs nothing is not
computed: without a divergence the teacher makes no logits, and without features and divergence it does not run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresso.core.squarehead import Norm, squared_error
from compresso.training.halves import Compare, Halves, Tokens, check_pair, next_tokens
from compresso.training.logit_losses import logit_losses
from compresso.training.order import Micro


class SquareHeadObjective(nn.Module):
    """The three losses of a student under a teacher.

    Args:
        model: the student, whose weights learn.
        student: it in halves, without blocks.
        teacher: the dense model in halves, with the blocks that the student's are compared with, in order; None where
            neither features nor logits are compared.
        blocks: of the student, as many; the last is compared behind the final norm, as published.
        compare: where both are compared on a batch.
        dimensions: which of the teacher's hidden dimensions the student has left [student's hidden], int64; None for
            all.
        norm: of features; see `compresso.core.squarehead`.
        hard_weight, kl_weight, feature_weight: of the three.
        temperature: of the divergence.
        tokens: where logits are compared; features are at all positions but padding.
        chunk: tokens whose logits exist at a time.

    Raises:
        RecipeError: the models decide among different outcomes.
        ArchError: a model that cannot be cut in halves.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Halves,
        teacher: Halves | None,
        blocks: Sequence[nn.Module],
        *,
        compare: Compare = next_tokens,
        dimensions: Tensor | None = None,
        norm: Norm = "global",
        hard_weight: float = 1.0,
        kl_weight: float = 0.0,
        feature_weight: float = 1.0,
        temperature: float = 1.0,
        tokens: Tokens = "labelled",
        chunk: int = 512,
    ) -> None:
        super().__init__()
        check_pair(student, teacher)
        self.model = model
        self._student, self._teacher, self._blocks, self._dimensions = student, teacher, list(blocks), dimensions
        self._norm: Norm = norm
        self._compare, self._temperature, self._chunk = compare, temperature, chunk
        self._hard, self._kl, self._features = hard_weight, kl_weight, feature_weight
        self._tokens: Tokens = tokens

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels.

        Returns:
            "loss" [] to differentiate, and to log, where they have a weight: "hard", "divergence", "features".

        Raises:
            ValueError: no position of the batch counts.
        """
        at, counted = self._compare(batch, self._tokens), self._compare(batch, "all").states
        taught, waiting = self._taught(batch, at.places)
        terms: list[Tensor] = []

        def take(state: Tensor) -> None:
            terms.append(self._term(state, waiting.pop(), counted))

        behind_norm = bool(waiting) and self._student.reads_states
        hooked = () if not waiting else self._blocks[:-1] if behind_norm else self._blocks
        with _behind(hooked, take):
            last, _ = self._student.read(batch)
        if behind_norm:
            take(last)
        loss, facts = self._on_logits(last[at.places], taught, at.targets[at.places])
        if terms:
            features = torch.stack([term.to(loss.device) for term in terms]).sum()
            loss = loss + self._features * features
            facts["features"] = features.detach()
        return {"loss": loss, **facts}

    @torch.no_grad()
    def _taught(self, batch: Mapping[str, Tensor], places: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """What the teacher's logits are made of [n, width], if they are compared, and its states, the first last."""
        if self._teacher is None:
            return None, []
        last, states = self._teacher.read(batch)
        if self._teacher.reads_states and states:
            states[-1] = last
        return last[places.to(last.device)] if self._kl else None, states[::-1] if self._features else []

    def _term(self, ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
        """A block's term [], of the tokens that count [batch, seq], on the dimensions that both have."""
        theirs = theirs[counted.to(theirs.device)]
        if self._dimensions is not None:
            theirs = theirs[:, self._dimensions.to(theirs.device)]
        return squared_error(ours[counted.to(ours.device)], theirs.to(ours.device), self._norm)

    def _on_logits(self, last: Tensor, taught: Tensor | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Label loss and divergence over places: last, taught [n, width] of each model, targets [n]."""
        return logit_losses(
            self._student,
            self._teacher,
            last,
            taught,
            targets,
            hard=self._hard,
            kl=self._kl,
            temperature=self._temperature,
            chunk=self._chunk,
        )


@contextmanager
def _behind(blocks: Sequence[nn.Module], take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context each block's output is taken as it is made."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
