"""What HomoDistil minimises (Liang et al., arXiv 2302.09632, section 3.1): the task, and five looks at one teacher.

    loss = hard x task + kl x T^2 KL(teacher || student) + embedding x d(E) + hidden x sum_k d(H_k) + attention x sum_k
           MSE(A_k)

E are the embeddings that the first layer reads, H_k the states behind layer k (the last behind a final norm, where
there is one), A_k the attention maps of layer k. d is the mean squared difference over the hidden dimensions that both
have (the published projection, which begins as the identity and loses its rows, held at that), or SquareHead's, which
is relative to the teacher's. Maps are compared over the heads and the tokens that both have.

The student begins as the teacher, so that all but the first are 0 at first. What weighs nothing is not computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.squarehead import Norm, squared_error
from compresso.errors import ArchError
from compresso.training.gradual_pruning import Left
from compresso.training.halves import Compare, Halves, Tokens, block_outputs, check_pair
from compresso.training.logit_losses import logit_losses
from compresso.training.order import Micro


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the loss counts; 0 leaves it out. Parts of layers are sums over them."""

    hard: float = 1.0
    kl: float = 1.0
    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Args:
        halves: it in halves, with its blocks if hidden states are compared.
        embedding: the module whose output the first layer reads.
        blocks: its layers, whose attention maps are compared.
        group: query heads that share a key/value head.
    """

    halves: Halves
    embedding: nn.Module
    blocks: Sequence[nn.Module]
    group: int = 1


@dataclass(frozen=True)
class Shown:
    """What a model showed on a batch: the last states or logits, states behind blocks, embeddings, attention maps."""

    last: Tensor
    states: Sequence[Tensor]
    embedding: Tensor | None
    maps: Sequence[Tensor]


class HomoDistilLosses:
    """The loss of a student that loses units.

    Args:
        student, teacher: both models; the teacher has all of its layers.
        compare: where both are compared on a batch.
        weights: of the parts.
        norm: of d; see `compresso.core.squarehead`.
        temperature: of the divergence.
        tokens: where logits are compared; states and maps are at all positions but padding.
        chunk: tokens whose logits exist at a time.

    Raises:
        RecipeError: the models decide among different outcomes.
        ArchError: a model that cannot be cut in halves.
    """

    def __init__(
        self,
        student: Side,
        teacher: Side,
        *,
        compare: Compare,
        weights: LossWeights,
        norm: Norm = "none",
        temperature: float = 1.0,
        tokens: Tokens = "labelled",
        chunk: int = 512,
    ) -> None:
        check_pair(student.halves, teacher.halves)
        self._student, self._teacher, self._compare, self._weights = student, teacher, compare, weights
        self._norm: Norm = norm
        self._temperature, self._chunk = temperature, chunk
        self._tokens: Tokens = tokens

    def __call__(self, batch: Mapping[str, Tensor], micro: Micro, left: Left) -> dict[str, Tensor]:
        """batch: what the models read, and labels.

        Returns:
            "loss" [] to differentiate, and to log, where they have a weight: "hard", "divergence", "embedding",
            "hidden", "attention".

        Raises:
            ValueError: no position of the batch counts.
        """
        at, weights = self._compare(batch, self._tokens), self._weights
        counted = self._compare(batch, "all").states
        with torch.no_grad():
            theirs = self._shown(self._teacher, batch)
        ours = self._shown(self._student, batch)
        loss, facts = logit_losses(
            self._student.halves,
            self._teacher.halves,
            ours.last[at.places],
            theirs.last[at.places.to(theirs.last.device)] if weights.kl else None,
            at.targets[at.places],
            hard=weights.hard,
            kl=weights.kl,
            temperature=self._temperature,
            chunk=self._chunk,
        )
        layers = left.plan.kept.get("layers", tuple(range(len(self._teacher.blocks))))
        parts: dict[str, tuple[float, list[Tensor]]] = {}
        if ours.embedding is not None and theirs.embedding is not None:
            parts["embedding"] = weights.embedding, [self._apart(ours.embedding, theirs.embedding, counted, left)]
        if weights.hidden:
            pairs = zip(ours.states, (theirs.states[i] for i in layers), strict=True)
            parts["hidden"] = weights.hidden, [self._apart(one, other, counted, left) for one, other in pairs]
        if weights.attention:
            parts["attention"] = (
                weights.attention,
                [
                    self._maps_apart(i, layer, ours.maps[i], theirs.maps[layer], counted, left)
                    for i, layer in enumerate(layers)
                ],
            )
        for name, (weight, terms) in parts.items():
            term = torch.stack([one.to(loss.device) for one in terms]).sum()
            loss = loss + weight * term
            facts[name] = term.detach()
        return {"loss": loss, **facts}

    def _shown(self, side: Side, batch: Mapping[str, Tensor]) -> Shown:
        """A forward pass, and what is compared of it."""
        with ExitStack() as hooks:
            seen = hooks.enter_context(block_outputs([side.embedding] if self._weights.embedding else []))
            maps = hooks.enter_context(attention_maps(side.blocks if self._weights.attention else []))
            last, states = side.halves.read(batch)
        if side.halves.reads_states and states:
            states[-1] = last
        return Shown(last, states, seen[0] if seen else None, maps)

    def _apart(self, ours: Tensor, theirs: Tensor, counted: Tensor, left: Left) -> Tensor:
        """The distance [] of states [batch, seq, hidden] of each model, of the tokens that count [batch, seq]."""
        ours, theirs = ours[counted.to(ours.device)], theirs[counted.to(theirs.device)].to(ours.device)
        if (dimensions := left.plan.kept.get("hidden")) is not None:
            theirs = theirs[:, list(dimensions)]
        if (there := left.ours.get("hidden")) is not None:
            ours = ours[:, there.to(ours.device)]
        return squared_error(ours, theirs, self._norm)

    def _maps_apart(
        self, layer: int, original: int, ours: Tensor, theirs: Tensor, counted: Tensor, left: Left
    ) -> Tensor:
        """The mean squared difference [] of maps [batch, heads, seq, seq] of one layer, over queries and keys that are
        no padding.
        """
        if (heads := left.plan.kept.get(f"layers.{original}.heads")) is not None:
            theirs = theirs[:, _queries(torch.tensor(heads), self._teacher.group).to(theirs.device)]
        if (there := left.ours.get(f"layers.{layer}.heads")) is not None:
            ours = ours[:, _queries(there, self._student.group).to(ours.device)]
        squares = (ours.float() - theirs.to(ours.device).float()).square()
        real = counted.to(ours.device)
        pairs = (real[:, None, :, None] & real[:, None, None, :]).to(squares)
        return (squares * pairs).sum() / (pairs.sum() * squares.shape[1])


def embedding_of(model: PreTrainedModel) -> nn.Module:
    """The module that makes what the first layer reads: an encoder's embeddings, or a decoder's."""
    base = model.base_model
    assert isinstance(base, nn.Module)
    found = dict(base.named_children()).get("embeddings", model.get_input_embeddings())
    assert isinstance(found, nn.Module)
    return found


@contextmanager
def attention_maps(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The blocks' attention maps [batch, heads, seq, seq], in order, once a forward pass under eager attention has run.

    Of a block's modules the first that returns such a thing behind its output is believed.

    Raises:
        ArchError: on leaving, if a block gave none.
    """
    found: dict[int, Tensor] = {}
    maps: list[Tensor] = []

    def hook_of(i: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if i not in found and isinstance(output, tuple) and len(output) > 1:  # pyright: ignore
                second: Any = output[1]
                if isinstance(second, Tensor) and second.dim() == 4:
                    found[i] = second

        return keep

    handles = [module.register_forward_hook(hook_of(i)) for i, block in enumerate(blocks) for module in block.modules()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(blocks):
        lacking = next(i for i in range(len(blocks)) if i not in found)
        raise ArchError(
            f"layer {lacking} ({type(blocks[lacking]).__name__}) gives no attention maps; set attention_weight: 0"
        )
    maps += [found[i] for i in range(len(blocks))]


def _queries(heads: Tensor, group: int) -> Tensor:
    """Query heads of key/value heads."""
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
