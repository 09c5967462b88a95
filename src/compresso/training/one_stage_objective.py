"""What a rounded model minimises under its full teacher: soft labels, attentions and hidden states at once (XTC, arXiv
2206.01859, section 3.2; arXiv 2301.12017).

    loss = logit_weight x soft cross-entropy + attention_weight x sum over layers of attention distances
         + hidden_weight x sum over layers of hidden distances + hard_weight x cross-entropy of labels

Attention probabilities are what the blocks' attentions return beside their output; both models must compute eager
attention. What weighs nothing is neither kept nor compared, and a teacher of whom nothing is asked does not run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresso.core.distillation import chunked
from compresso.core.losses import IGNORED
from compresso.core.one_stage import LayerMap, attention_distance, soft_cross_entropy
from compresso.core.squarehead import Norm, squared_error
from compresso.edit.quantise_inputs import InputRounding
from compresso.errors import ArchError
from compresso.training.halves import Compare, Halves, Tokens, check_pair, next_tokens
from compresso.training.order import Micro

Over = Literal["examples", "classes"]
"""What soft labels are averaged over: examples, or examples and classes, as in the public scripts."""


@dataclass(frozen=True)
class Taught:
    """A model with a teacher.

    Args:
        student, teacher: in halves, without blocks; no teacher where nothing is compared.
        ours, theirs: blocks of each.
        pairs: what the student's layers are compared with; none where neither attentions nor states are.
        heads: of each of the student's layers, which of the teacher's heads it has left, int64; None for all.
        dimensions: which of the teacher's hidden dimensions the student has left, int64; None for all.
    """

    student: Halves
    teacher: Halves | None
    ours: Sequence[nn.Module] = ()
    theirs: Sequence[nn.Module] = ()
    pairs: LayerMap | None = None
    heads: Sequence[Tensor | None] = ()
    dimensions: Tensor | None = None


@dataclass(frozen=True)
class Weighs:
    """The weights of the four terms, and how each is taken.

    Args:
        logit, attention, hidden, hard: see this file's header.
        over: see `Over`.
        norm: what hidden distances are relative to; see `compresso.core.squarehead`.
        temperature: divides logits.
        tokens: where logits are compared.
        chunk: tokens whose logits exist at a time.
    """

    logit: float = 1.0
    attention: float = 1.0
    hidden: float = 1.0
    hard: float = 0.0
    over: Over = "examples"
    norm: Norm = "none"
    temperature: float = 1.0
    tokens: Tokens = "labelled"
    chunk: int = 512


class OneStageObjective(nn.Module):
    """The four terms of a student under a teacher.

    Args:
        model: the student, whose weights learn.
        taught: it and its teacher.
        weighs: the terms.
        compare: where both are compared on a batch.
        reading: roundings of inputs that are told which tokens are padding.

    Raises:
        RecipeError: the models decide among different outcomes.
        ArchError: a model that cannot be cut in halves.
    """

    def __init__(
        self,
        model: nn.Module,
        taught: Taught,
        weighs: Weighs,
        compare: Compare = next_tokens,
        reading: Sequence[InputRounding] = (),
    ) -> None:
        super().__init__()
        check_pair(taught.student, taught.teacher)
        self.model = model
        self._taught, self._weighs, self._compare, self._reading = taught, weighs, compare, tuple(reading)

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels.

        Returns:
            "loss" [] to differentiate, and to log, where they have a weight: "soft", "hard", "attention", "hidden".

        Raises:
            ValueError: no position of the batch counts.
            ArchError: an attention shows no probabilities.
        """
        at, counted = self._compare(batch, self._weighs.tokens), self._compare(batch, "all").states
        taught, shown = self._ask(batch, at.places)
        for reading in self._reading:
            reading.counted = counted
        with _looking(self._taught.ours, self._sees) as seen:
            last, _ = self._taught.student.read(batch)
        loss, facts = self._on_logits(last[at.places], taught, at.targets[at.places])
        if shown is not None and self._taught.pairs is not None:
            if self._weighs.attention:
                facts["attention"] = self._attentions(seen, shown, self._taught.pairs, counted)
                loss = loss + self._weighs.attention * facts["attention"]
            if self._weighs.hidden:
                facts["hidden"] = self._states(seen, shown, self._taught.pairs, counted)
                loss = loss + self._weighs.hidden * facts["hidden"]
        return {"loss": loss, **{name: fact.detach() for name, fact in facts.items()}}

    @property
    def _sees(self) -> tuple[bool, bool]:
        """Whether attentions, and whether states are wanted."""
        compared = self._taught.teacher is not None and self._taught.pairs is not None
        return compared and bool(self._weighs.attention), compared and bool(self._weighs.hidden)

    @torch.no_grad()
    def _ask(self, batch: Mapping[str, Tensor], places: Tensor) -> tuple[Tensor | None, "_Seen | None"]:
        """What the teacher's logits are made of [n, width], if they are compared, and what its blocks showed."""
        if self._taught.teacher is None:
            return None, None
        with _looking(self._taught.theirs, self._sees) as seen:
            last, _ = self._taught.teacher.read(batch)
        return last[places.to(last.device)] if self._weighs.logit else None, seen

    def _on_logits(self, last: Tensor, taught: Tensor | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Soft and hard labels over places: last, taught [n, width] of each model, targets [n]."""
        weighs, n_labels = self._weighs, int((targets != IGNORED).sum())
        if weighs.hard and not n_labels:
            raise ValueError(
                f"none of a batch's {len(targets)} tokens is labelled, so hard_weight has nothing to weigh"
            )
        if not weighs.hard and taught is None:
            return last.new_zeros((), dtype=torch.float32), {}

        def loss(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
            logits, parts = self._taught.student.logits(part), list[Tensor]()
            if taught is not None:
                with torch.no_grad():
                    wanted = self._teacher().logits(taught[rows]).to(logits.device)
                shared = len(targets) * (logits.shape[-1] if weighs.over == "classes" else 1)
                parts.append(soft_cross_entropy(logits, wanted, weighs.temperature).sum() / shared)
            if weighs.hard:
                sums = functional.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORED, reduction="sum")
                parts.append(sums / n_labels)
            total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            assert isinstance(total, Tensor)
            return total, torch.stack(parts)

        terms = {"soft": weighs.logit} if taught is not None else {}
        terms |= {"hard": weighs.hard} if weighs.hard else {}
        weights = list(terms.values())
        total, facts = chunked(loss, last, self._taught.student.parameters(), weighs.chunk)
        return total, dict(zip(terms, facts, strict=True))

    def _teacher(self) -> Halves:
        assert self._taught.teacher is not None
        return self._taught.teacher

    def _attentions(self, ours: "_Seen", theirs: "_Seen", pairs: LayerMap, counted: Tensor) -> Tensor:
        """The sum over the student's layers that have an attention [], each with the teacher's heads it has left."""
        terms: list[Tensor] = []
        for layer, (mine, wanted) in enumerate(zip(ours.attentions, pairs.attentions, strict=True)):
            if mine is None:
                continue
            shown = theirs.attentions[wanted]
            if shown is None:
                raise ArchError(
                    f"layer {wanted} of the teacher shows no attention that layer {layer} could learn from; set"
                    " attention_weight: 0"
                )
            if layer < len(self._taught.heads) and (heads := self._taught.heads[layer]) is not None:
                shown = shown[:, heads.to(shown.device)]
            terms.append(attention_distance(mine, shown.to(mine.device), counted))
        if not terms:
            raise ArchError("no layer shows the probabilities of its attention; set attention_weight: 0")
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _states(self, ours: "_Seen", theirs: "_Seen", pairs: LayerMap, counted: Tensor) -> Tensor:
        """The sum over the student's hidden states [], on the dimensions that both have."""
        terms: list[Tensor] = []
        for mine, wanted in zip(ours.states, pairs.hiddens, strict=True):
            there = theirs.states[wanted]
            there = there[counted.to(there.device)]
            if self._taught.dimensions is not None:
                there = there[:, self._taught.dimensions.to(there.device)]
            terms.append(squared_error(mine[counted.to(mine.device)], there.to(mine.device), self._weighs.norm))
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()


@dataclass
class _Seen:
    """What blocks showed in a pass: states [batch, seq, hidden], those of the embeddings first; of each block its
    attention probabilities [batch, heads, seq, seq], None where it has no attention.
    """

    states: list[Tensor] = field(default_factory=list[Tensor])
    attentions: list[Tensor | None] = field(default_factory=list[Tensor | None])


@contextmanager
def _looking(blocks: Sequence[nn.Module], sees: tuple[bool, bool]) -> Iterator[_Seen]:
    """Within the context a pass notes what the blocks show; sees: whether attentions, and whether states."""
    seen = _Seen(attentions=[None] * len(blocks))
    attentions, states = sees

    def enters(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.states.append(given[0] if given else named["hidden_states"])

    def leaves(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.states.append(output[0] if isinstance(output, tuple) else output)

    def attends(layer: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            shown = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(shown, Tensor) and shown.dim() == 4 and shown.is_floating_point():
                seen.attentions[layer] = shown

        return hook

    handles = [blocks[0].register_forward_pre_hook(enters, with_kwargs=True)] if states and blocks else []
    handles += [block.register_forward_hook(leaves) for block in blocks] if states else []
    if attentions:
        handles += [
            module.register_forward_hook(attends(layer))
            for layer, block in enumerate(blocks)
            for module in block.modules()
            if module is not block
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
