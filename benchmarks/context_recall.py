"""A fact early in the context, asked late: what caches that forget cost where perplexity does not see it.

Facts are drawn anew for each item, so that weights cannot know them. For the embedded model they are in its own world's
words, "Tessa lives by the mill.", of people and places that it knows; for others, values of keys in plain words. Then
text that speaks of other things, cut so that all items are of one length, and the question: the beginning of one fact,
any of them. Choices are the values of all facts of the item, which differ in their first token; that of the highest
likelihood is the answer. The question comes at the end of the same chunks as the rest: nothing tells a rule what will
be asked.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compresso.data import world
from compresso.data.world.facts import PEOPLE, PLACES
from compresso.edit.context_attention import keepers_of
from compresso.edit.context_cache import ContextCache

KEYS = ("Anna", "Paul", "Maria", "Peter", "Laura", "James", "Emma", "David", "Helen", "Frank", "Alice", "George")
_WORDS = "river stone apple window garden silver winter bridge paper candle mountain bread"
VALUES = tuple(_WORDS.split())
FILLER = (
    "The weather was mild for most of the week.",
    "Some trains arrived a little late at the station.",
    "Nobody could say when the work would be done.",
    "The shop on the corner opens at nine.",
    "They talked about the news over a long lunch.",
    "A bus stopped and two people got off.",
    "It had rained during the night.",
    "The meeting was moved to another day.",
)


@dataclass(frozen=True)
class Items:
    """Questions of one length.

    Args:
        ids: with the beginning of a fact at the end [items, tokens].
        choices: first tokens of the values [items, facts].
        answers: the place of the right one [items].
    """

    ids: Tensor
    choices: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Kind:
    """Facts of one kind: how one begins, how it ends, of whom and what, and what stands between."""

    begins: str
    names: Sequence[str]
    values: Sequence[str]
    filler: Iterator[str]


def kind_of(embedded: bool, seed: int) -> Kind:
    """The kind of facts for a model."""
    if embedded:
        return Kind("{name} lives by the", tuple(PEOPLE), PLACES, world.documents(100_000, seed))
    rng = random.Random(seed)
    return Kind("The code word of {name} is", KEYS, VALUES, iter(lambda: rng.choice(FILLER), ""))


def items(tokenizer: PreTrainedTokenizerBase, kind: Kind, n: int, length: int, facts: int, seed: int) -> Items:
    """`n` items of `length` tokens with so many facts each.

    Raises ValueError where the facts leave no room for anything else.
    """
    rng, ids, choices, answers = random.Random(seed), [], [], []
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for _ in range(n):
        names, values = rng.sample(kind.names, facts), distinct(tokens, kind.values, facts, rng)
        begun = [kind.begins.format(name=name) for name in names]
        early = tokens(" ".join(f"{one} {value}." for one, value in zip(begun, values, strict=True)))
        asked = rng.randrange(facts)
        late = tokens(" " + begun[asked])
        room = length - len(bos) - len(early) - len(late)
        if room < 1:
            raise ValueError(f"{length} tokens hold no {facts} facts and a question; give a longer --length")
        between: list[int] = []
        while len(between) < room:
            if not any(name in (text := next(kind.filler)) for name in names):
                between += tokens(" " + text)
        ids.append([*bos, *early, *between[:room], *late])
        choices.append([tokens(f" {value}")[0] for value in values])
        answers.append(asked)
    return Items(torch.tensor(ids), torch.tensor(choices), torch.tensor(answers))


def distinct(tokens: Callable[[str], list[int]], values: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """Values whose first tokens differ."""
    found: dict[int, str] = {}
    for value in rng.sample(values, len(values)):
        found.setdefault(tokens(f" {value}")[0], value)
    if len(found) < n:
        raise ValueError(f"the values have {len(found)} different first tokens, and {n} facts are asked for")
    return list(found.values())[:n]


@torch.no_grad()
def answered(model: PreTrainedModel, asked: Items, chunk: int, batch: int) -> tuple[Tensor, float, float]:
    """Whether each item is answered rightly [items], the share of tokens held before the answer, and bytes of the cache
    for one item.

    Args:
        model: with a cache of ours, or without.
        asked: the items.
        chunk: tokens read at a time through the cache.
        batch: items read together.
    """
    right, live, size = [], 0.0, 0.0
    for rows in torch.arange(len(asked.ids)).split(batch):
        keepers = keepers_of(model)
        cache: Cache = ContextCache(len(keepers)) if keepers else DynamicCache(config=model.config)
        last = torch.empty(0)
        for piece in asked.ids[rows].split(chunk, dim=1):
            last = model(piece.to(model.device), past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        scores = last.gather(1, asked.choices[rows])
        right.append(scores.argmax(1) == asked.answers[rows])
        if isinstance(cache, ContextCache):
            live, size = live + len(rows) * cache.live_fraction(), size + cache.allocated_bytes()
        else:
            live += len(rows)
            size += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # pyright: ignore
    return torch.cat(right), live / len(asked.ids), size / len(asked.ids)
