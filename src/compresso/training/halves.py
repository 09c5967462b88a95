"""Models in halves, as distillation reads them: what makes the last hidden states, and what makes logits of them.

Language models are cut where logits are made, which are as wide as the vocabulary; logits of classes and positions are
taken whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresso.core.loss import logits_of
from compresso.core.losses import IGNORED
from compresso.edit.rounding import ROUNDINGS, full_precision, rounding_of
from compresso.errors import ArchError, RecipeError

Tokens = Literal["labelled", "all"]


@dataclass(frozen=True)
class Compared:
    """Where a batch's models are compared.

    Args:
        targets: the label of each of the places that `Halves.read` gives first, int64, -100 for none.
        places: which of these places count, bool, of the same shape.
        states: which positions' hidden states count [batch, seq], bool.
        label_loss: the loss [] of labels [n] by logits [n, outcomes] of all places that count, at once; None for the
            mean of their cross-entropies.
    """

    targets: Tensor
    places: Tensor
    states: Tensor
    label_loss: Callable[[Tensor, Tensor], Tensor] | None = None


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
