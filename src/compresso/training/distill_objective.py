"""What distillation minimises: a divergence from a teacher's distributions, and by choice a label loss and one on
hidden states.

Language models are cut where logits are made: hidden states of all tokens are computed at once, logits (which are as
wide as the vocabulary) for a few hundred tokens at a time. Logits of classes and positions are taken whole. The
teacher is no submodule of the objective, so it stays in evaluation mode, frozen, where and in which dtype it is, and
out of every checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.distillation import Comparison, Distance, chunked, compared, dynamic_scale, hidden_distance
from compresso.core.loss import logits_of
from compresso.core.losses import IGNORED
from compresso.edit.rounding import ROUNDINGS, full_precision, rounding_of
from compresso.errors import ArchError, RecipeError
from compresso.training.order import Micro

Tokens = Literal["labelled", "all"]


@dataclass(frozen=True)
class Compared:
    """Where a batch's models are compared.

    Args:
        targets: the label of each of the places that `Halves.read` gives first, int64, -100 for none.
        places: which of these places count, bool, of the same shape.
        states: which positions' hidden states count [batch, seq], bool.
    """

    targets: Tensor
    places: Tensor
    states: Tensor


Compare = Callable[[Mapping[str, Tensor], Tokens], Compared]
"""A batch, and which of its tokens are asked for -> where models are compared on it."""


class Halves(Protocol):
    """A model in two halves: batch -> what is computed at once; that -> logits, a part at a time."""

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What logits are made of [batch, ..., width], and the outputs of chosen blocks [batch, seq, hidden]."""
        ...

    def logits(self, last: Tensor) -> Tensor:
        """Logits [n, outcomes] of what `read` gave [n, width]."""
        ...

    def parameters(self) -> Sequence[Tensor]:
        """The parameters that `logits` uses."""
        ...

    def check(self) -> None:
        """Raises ArchError if the two halves are not the whole."""
        ...

    @property
    def reads_states(self) -> bool:
        """Whether what `read` gives first are the last hidden states."""
        ...

    @property
    def outcomes(self) -> int:
        """Among how many the model decides."""
        ...

    @property
    def words(self) -> str:
        """What these are, in a word."""
        ...


def next_tokens(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """Positions that predict a label, or all but padding; their labels are those of the next."""
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # of the position before
    chosen = targets != IGNORED if tokens == "labelled" else batch["attention_mask"].bool()
    return Compared(targets, chosen, chosen)


def examples(batch: Mapping[str, Tensor], tokens: Tokens) -> Compared:
    """Every label, one or several an example, and the hidden states of all positions but padding."""
    labels = batch["labels"]
    return Compared(labels, torch.ones_like(labels, dtype=torch.bool), batch["attention_mask"].bool())


@torch.no_grad()
def check_halves(model: PreTrainedModel, halves: Halves) -> None:
    """Compare a model's two halves with the whole.

    Raises:
        ArchError: something unknown lies between them.
    """
    ids = torch.arange(min(8, halves.outcomes), device=model.device).unsqueeze(0)
    whole = lambda: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    with full_precision():
        wanted = whole()
        found = halves.logits(halves.read({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0])
        apart = float((wanted - found).abs().max())
        usual = apart <= 1e2 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        explained = usual or apart <= ROUNDINGS * rounding_of(model, whole, wanted)
    if not explained:
        name = type(model).__name__
        raise ArchError(
            f"{name} changes its logits after the head in a way nobody described; distil another architecture"
        )


@dataclass(frozen=True)
class Network:
    """A causal language model in two halves: ids -> hidden states, hidden states -> logits.

    Args:
        model: without or with adapters in its layers.
        blocks: those of its layers whose outputs are wanted.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module] = ()

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the head reads [batch, seq, hidden], and the outputs of the blocks, each of that shape; on the model's
        device.
        """
        inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with block_outputs(self.blocks) as found:
            last = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return last, list(found)

    def head(self) -> nn.Module:
        """The linear that makes logits."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    def logits(self, last: Tensor) -> Tensor:
        """Logits [n, vocab] of what the head reads [n, hidden]."""
        logits = self.head()(last)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def parameters(self) -> Sequence[Tensor]:
        """Those of the head."""
        return list(self.head().parameters())

    def check(self) -> None:
        """Compare the two halves with the whole. Raises ArchError as `check_halves`."""
        check_halves(self.model, self)

    @property
    def reads_states(self) -> bool:
        """They are, behind the final norm."""
        return True

    @property
    def outcomes(self) -> int:
        """Rows of the head."""
        weight = self.head().get_parameter("weight")
        return int(weight.shape[0])

    @property
    def words(self) -> str:
        """What the head decides among."""
        return "tokens"


@dataclass(frozen=True)
class Whole:
    """A model whose logits are few: a classifier, or one that finds answers. Its first half is all of it.

    Args:
        model: without or with adapters in its layers.
        blocks: those of its layers whose outputs are wanted.
        outcomes: among how many it decides.
        words: what these are, in a word.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    outcomes: int
    words: str

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits [batch, classes], or those of each token to be the first and the last [batch, 2, seq], and the outputs
        of the blocks, each [batch, seq, hidden]; on the model's device.
        """
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        with block_outputs(self.blocks) as found:
            logits = logits_of(self.model, inputs)
        return logits.transpose(1, -1), list(found)  # what is decided among comes last

    def logits(self, last: Tensor) -> Tensor:
        """The same."""
        return last

    def parameters(self) -> Sequence[Tensor]:
        """None: the second half does nothing."""
        return ()

    def check(self) -> None:
        """Nothing can lie between the halves."""

    @property
    def reads_states(self) -> bool:
        """They are logits."""
        return False


def check_pair(student: Halves, teacher: Halves | None) -> None:
    """Check that both models can be cut, and decide among the same.

    Raises:
        RecipeError: the models decide among different outcomes.
        ArchError: a model that cannot be cut in halves.
    """
    if teacher is not None and student.outcomes != teacher.outcomes:
        raise RecipeError(
            f"the student decides among {student.outcomes} {student.words}, its teacher among {teacher.outcomes}; give"
            " a teacher of the same"
        )
    for network in (student, teacher):
        if network is not None:
            network.check()


def refuse_other_outcomes(outcomes: int, teacher: Halves) -> None:
    """Raise RecipeError if a student that decides among so many outcomes cannot be compared with its teacher."""
    if outcomes == teacher.outcomes:
        return
    if teacher.words != "tokens":
        same = "labels" if teacher.words == "classes" else teacher.words
        raise RecipeError(
            f"the smaller model has {outcomes} {teacher.words}, its teacher {teacher.outcomes}; distil from a teacher"
            f" of the same {same}"
        )
    raise RecipeError(
        f"the smaller model has a vocabulary of {outcomes}, its teacher one of {teacher.outcomes}: no token is"
        " comparable. Distil before tokens are removed"
    )


class DistillObjective(nn.Module):
    """The divergence from a teacher, averaged over tokens, plus weighted other losses.

    Args:
        model: the smaller model, with adapters or with trainable weights.
        student, teacher: both models in halves; as many blocks each, in pairs, if hidden states are compared.
        dimensions: which of the teacher's hidden dimensions the student has left [student's hidden], int64; None for
            all.
        divergence, temperature, beta: as in `core.distillation.compared`.
        compare: where both are compared on a batch.
        hard_weight: of the cross-entropy of labels.
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
        loss, facts = self._on_logits(last[at.places], taught, at.targets[at.places])
        if self._intermediate_weight:
            pairs = zip(states, shown, strict=True)
            distances = [self._distance(ours[at.states], theirs[at.states.to(theirs.device)]) for ours, theirs in pairs]
            distance = torch.stack(distances).mean()
            loss = loss + self._intermediate_weight * dynamic_scale(facts["divergence"], distance) * distance
            facts["intermediate"] = distance.detach()
        return {"loss": loss, **facts}

    def _on_logits(self, last: Tensor, taught: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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
            hard = (
                functional.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORED, reduction="sum")
                / n_labels
            )
            return divergence + self._hard_weight * hard, torch.stack([divergence, hard])

        total, facts = chunked(loss, last, self._student.parameters(), self._chunk)
        return total, dict(zip(("divergence", "hard"), facts, strict=False))

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Between hidden states [n, hidden] of one pair of blocks, on the dimensions that both have."""
        if self._dimensions is not None:
            theirs = theirs[:, self._dimensions.to(theirs.device)]
        return hidden_distance(ours, theirs.to(ours.device), self._intermediate)


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The blocks' outputs, in order, once a forward pass has run."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
